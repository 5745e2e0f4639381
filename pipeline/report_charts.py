"""Line charts as HTML and SVG that need no script: any width, any printer, light or dark.

The lines live in an SVG that is stretched to its frame (strokes keep their width), the numbers on the axes are HTML
beside it, so that text stays readable at every size.  report.js adds a read-out under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Value = float | None
"""A measured number; None where there was none (a diverged loss, an older run)."""

NONE = "\N{EN DASH}"
"""Stands where nothing was measured."""
MOST_POINTS = 1000
SIDE = 1000
"""Units of the SVG's own coordinates, both ways; 0 is at the top left."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: its name in the legend, its CSS class (a colour), its places on the axis, a value for each of them."""

    name: str
    style: str
    xs: Sequence[float]
    """Images seen, rising."""
    values: Sequence[Value]
    best: int | None = None
    """Index of a point that gets a ring around it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a chart's values are written, and where its axis ends if not where the data does."""

    digits: int = 2
    suffix: str = ""
    top: float | None = None
    guide: float | None = None
    """A value worth a dashed line of its own, where the axis reaches it."""
    x_ticks: int = 6
    """Most numbers on the axis of images seen, beside 0."""

    def text(self, value: Value) -> str:
        """The value as a reader sees it: '0.62', '78%', '1,204'."""
        return NONE if value is None else f"{value:,.{self.digits}f}{self.suffix}"


def smoothed(values: Sequence[Value], window: int) -> list[Value]:
    """Centred running mean; None where nothing was measured inside the window."""
    sums, counts = [0.0], [0]
    for v in values:
        sums.append(sums[-1] + (v or 0.0))
        counts.append(counts[-1] + (v is not None))
    result: list[Value] = []
    for i in range(len(values)):
        low, high = max(0, i - window // 2), min(len(values), i + window // 2 + 1)
        n = counts[high] - counts[low]
        result.append((sums[high] - sums[low]) / n if n else None)
    return result


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def envelope(values: Sequence[Value], most: int) -> list[int]:
    """At most `most` indices that keep every peak visible: the lowest and the highest value of each stretch."""
    if len(values) <= most:
        return list(range(len(values)))
    chosen: set[int] = set()
    stretches = most // 2
    for k in range(stretches):
        stretch = range(k * len(values) // stretches, (k + 1) * len(values) // stretches)
        known = [i for i in stretch if values[i] is not None] or [stretch[0]]
        chosen.add(min(known, key=lambda i: values[i] or 0.0))
        chosen.add(max(known, key=lambda i: values[i] or 0.0))
    return sorted(chosen)


def ticks(top: float, most: int, low: float = 0.0) -> list[float]:
    """Multiples of a round step from `low` to `top`, at most `most` of them beside the first; the step is 1, 2 or 5
    times a power of ten."""
    if top <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((top - low) / most))
    step = next(m * power for m in (1, 2, 5, 10) if (top - low) / (m * power) <= most + 1e-9)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(top / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.5, 250, 40k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def chart(title: str, lines: Sequence[Line], scale: Scale, *, raw: bool = True) -> str:
    """A figure: legend with the latest values, curves (measured faint, smoothed strong), axes.

    Args:
        title: names the chart for those who cannot see it.
        lines: at least one, with at least one point.
        scale: see there.
        raw: also what was measured, beside its mean.
    """
    windows = [len(line.xs) // 40 | 1 if len(line.xs) >= 50 else 1 for line in lines]
    means = [
        smoothed(smoothed(line.values, window), window)  # twice: no steps at a spike
        for line, window in zip(lines, windows, strict=True)
    ]
    ends, beyond = _ends(lines, means, scale)
    heights = ticks(ends.top, 5, ends.low)
    right = max((line.xs[-1] for line in lines if line.xs), default=0.0) or 1.0

    drawn = [f'<line class="rule" x1="0" x2="{SIDE}" y1="{ends.y(t)}" y2="{ends.y(t)}"/>' for t in heights]
    if scale.guide is not None and ends.low <= scale.guide <= ends.top:
        y = ends.y(scale.guide)
        drawn.append(f'<line class="guide" x1="0" x2="{SIDE}" y1="{y}" y2="{y}"/>')
    for line, window in zip(lines, windows, strict=True):
        if raw and window > 1:
            drawn.append(_path(line, line.values, envelope(line.values, MOST_POINTS), right, ends, "raw "))
    shown = [evenly(len(line.xs), MOST_POINTS // 2) for line in lines]
    for line, mean, indices in reversed(list(zip(lines, means, shown, strict=True))):  # the first lies on top
        drawn.append(_path(line, mean, indices, right, ends, ""))
        best = None if line.best is None else line.values[line.best]
        if line.best is not None and best is not None:
            point = f"M{SIDE * line.xs[line.best] / right:.1f} {ends.y(best)}h0"
            drawn.append(f'<path class="ring {line.style}" d="{point}"/><path class="hole" d="{point}"/>')

    y_axis = "".join(
        f'<span style="bottom:{100 * (t - ends.low) / (ends.top - ends.low):.2f}%">{short(t)}{scale.suffix}</span>'
        for t in heights
    )
    x_axis = "".join(
        f'<span style="left:{100 * t / right:.2f}%">{short(t)}</span>' for t in ticks(right, scale.x_ticks)
    )
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 24 4"><path class="{line.style}" d="M1 2H23"/></svg>'
        f"<span>{escape(line.name)}</span> <b>{scale.text(_latest(mean))}</b></li>"
        for line, mean in zip(lines, means, strict=True)
    )
    note = f'<p class="beyond">{escape(beyond)}</p>' if beyond else ""
    read_out = {
        "lines": [
            {"x": [line.xs[i] for i in indices], "y": [_rounded(mean[i]) for i in indices]}
            for line, mean, indices in zip(lines, means, shown, strict=True)
        ],
        "right": right,
        "digits": scale.digits,
        "suffix": scale.suffix,
    }
    return f"""<figure class="chart" role="img" aria-label="{escape(title)}">
<div class="legend"><ul>{legend}</ul><output></output></div>
<div class="frame"><div class="y-axis">{y_axis}</div>
<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">{"".join(drawn)}</svg><i></i></div>
<div class="x-axis">{x_axis}</div></div>{note}
<script type="application/json">{as_json(read_out)}</script></figure>"""


def as_json(value: object) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


@dataclass(frozen=True)
class _Ends:
    """The two ends of a value axis."""

    low: float
    top: float

    def y(self, value: float) -> str:
        """Where a value stands in the SVG."""
        return f"{SIDE - SIDE * min(max((value - self.low) / (self.top - self.low), 0.0), 1.0):.1f}"


def _ends(lines: Sequence[Line], means: Sequence[Sequence[Value]], scale: Scale) -> tuple[_Ends, str]:
    """The value axis, and a sentence about what lies beyond it.

    It begins at 0 unless values are negative, as a Wasserstein loss is.  A single spike would press all curves flat,
    so the axis ends where 99 of 100 values do.
    """
    if scale.top is not None:
        return _Ends(0.0, scale.top), ""
    values = sorted(v for line in lines for v in line.values if v is not None)
    if not values or values[0] == values[-1] == 0:
        return _Ends(0.0, 1.0), ""
    middle = [v for mean in means for v in mean if v is not None]
    last = len(values) - 1
    high, above = _end(values[-1], max(values[int(0.99 * last)], *middle))
    deep, below = _end(-values[0], max(-values[last - int(0.99 * last)], *(-v for v in middle)))
    span = ticks(high + deep, 5)
    step = span[1] - span[0]
    told = [f"the highest value, {scale.text(values[-1])}, lies above the frame"] if above else []
    told += [f"the lowest value, {scale.text(values[0])}, lies below it"] if below else []
    sentence = " and ".join(told)
    ends = _Ends(-step * math.ceil(deep / step - 1e-9), step * math.ceil(high / step - 1e-9))
    return ends, f"{sentence[0].upper()}{sentence[1:]}." if told else ""


def _end(extreme: float, most: float) -> tuple[float, bool]:
    """How far from 0 the axis reaches on one side, and whether the extreme lies beyond; 0 where nothing is there."""
    beyond = extreme > 0 and extreme > 1.5 * max(most, 0.0)
    return max(0.0, most if beyond else extreme), beyond


def _path(line: Line, values: Sequence[Value], indices: Sequence[int], right: float, ends: _Ends, kind: str) -> str:
    """The curve through these points; a gap where a value is missing, a dot where a point has no neighbour."""
    curve, dots = [], []
    stretch: list[str] = []
    for i in [*indices, None]:
        value = None if i is None else values[i]
        if i is not None and value is not None:
            stretch.append(f"{SIDE * line.xs[i] / right:.1f} {ends.y(value)}")
            continue
        if len(stretch) == 1:
            dots.append(f"M{stretch[0]}h0")  # a stroke without length is a dot, for its ends are round
        elif stretch:
            curve.append("M" + "L".join(stretch))
        stretch = []
    styles = ((f"{kind}{line.style}", curve), (f"dot {kind}{line.style}", dots))
    return "".join(f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in styles if parts)


def _rounded(value: Value) -> Value:
    return None if value is None else float(f"{value:.5g}")


def _latest(values: Sequence[Value]) -> Value:
    return next((v for v in reversed(values) if v is not None), None)
