"""Several runs on one page: settings that differ, where each has got to, curves on shared axes, grids side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeline.config import METRICS, ConfigError
from pipeline.files import written_aside
from pipeline.report_charts import NONE, Line, Scale, Value
from pipeline.report_metrics import NAMES, best_row, named, scale_of, value_text
from pipeline.report_parts import (
    SHARE,
    STATES,
    document,
    drawn,
    duration,
    empty,
    last,
    median,
    part,
    plain,
    recent,
    written,
)
from pipeline.report_run import Frame, Run, number, numbers, positions, read_run

STYLES = ("one", "two", "three", "four", "five", "six", "seven", "eight")
"""Colours, one a run; more runs than these cannot be told apart."""
_PLACES = ("run.dir",)
"""Settings that differ between any two runs and say nothing."""


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares runs, whole or not at all, and returns its path.

    Args:
        folders: of two runs or more, in the order of the page; of any length, finished or not.

    Raises:
        ConfigError: one of them twice, or too many.
        StorageError: no such run, a file of it that cannot be read, or a disk that refuses.
    """
    if len(folders) > len(STYLES):
        raise ConfigError(f"at most {len(STYLES)} runs can be compared, got {len(folders)}")
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(folders):
        if resolved[i] in resolved[:i]:
            raise ConfigError(f"each run must be given once, got {folder} twice")
    runs = [read_run(folder) for folder in folders]
    for run, name in zip(runs, unique_names(resolved), strict=True):
        run.name = name
    text = comparison(runs)
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parents as tell it from the others."""
    names = []
    for folder in folders:
        parts = folder.parts
        others = [other.parts for other in folders if other != folder]
        count = next((n for n in range(1, len(parts)) if not any(o[-n:] == parts[-n:] for o in others)), len(parts))
        names.append("/".join(parts[-count:]))
    return names


def comparison(runs: Sequence[Run]) -> str:
    """The whole page as HTML text; the runs' names must differ."""
    parts = [_header(runs), _figures(runs), _settings(runs), _pictures(runs), _metrics(runs), _curves(runs)]
    title = " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} DCGAN runs"
    return document(title, "\n".join(parts), "from what the runs had recorded until then.")


def _header(runs: Sequence[Run]) -> str:
    names = "".join(
        f'<li><svg class="key" viewBox="0 0 24 4"><path class="{style}" d="M1 2H23"/></svg>{escape(run.name)}</li>'
        for run, style in zip(runs, STYLES, strict=False)
    )
    notes = "".join(f"<li>{escape(f'{run.name}: {note}')}</li>" for run in runs for note in run.notes)
    told = f'<ul class="notes">{notes}</ul>' if notes else ""
    return f"""<header>
<p class="kicker">DCGAN training runs</p>
<h1>{len(runs)} runs compared</h1>
<ul class="runs">{names}</ul>
{told}
</header>"""


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str], int | None]]) -> str:
    """A column a run, a row a thing: its name, a text for each run, the index of one that stands out."""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = ""
    for name, texts, best in rows:
        cells = "".join(
            f"<td{' class=best' if i == best else ''}>{escape(text or NONE)}</td>" for i, text in enumerate(texts)
        )
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="runs-table"><tr><th></th>{head}</tr>{body}</table></div>'


def _figures(runs: Sequence[Run]) -> str:
    def row(name: str, text: Callable[[Run], str]) -> tuple[str, list[str], None]:
        return name, [text(run) for run in runs], None

    def lately(key: str, form: str = "{:.2f}", factor: float = 1) -> Callable[[Run], str]:
        return lambda run: written(_times(recent(run.column(key)), factor), form)

    rows: list[tuple[str, Sequence[str], int | None]] = [
        row("State", lambda run: STATES.get(str(run.status.get("state")), "")),
        row("Images seen", lambda run: written(run.images_seen, "{:,.0f}")),
        row("Epochs", lambda run: written(last(run.column("epoch")), "{:,.1f}")),
        row("Time", _time),
        row("Images a second, median", lambda run: written(median(run.column("images_per_s")), "{:,.0f}")),
        row("Precision", lambda run: str(run.status.get("precision") or "")),
        row("Ranks", lambda run: written(number(run.status.get("world_size")), "{:.0f}")),
        row("Loss D, lately", lately("loss_d")),
        row("Loss G, lately", lately("loss_g")),
        row("D(x), lately", lately("d_real", "{:.0f}%", 100)),
        row("D(G(z)), lately", lately("d_fake_before", "{:.0f}%", 100)),
        row("Spread against photographs, lately", lately("diversity", "{:.0f}%", 100)),
    ]
    for metric in _measured(runs):
        values = [last(numbers(run.metrics, metric)) for run in runs]
        rows.append((f"{named(metric)}, newest", [value_text(metric, v) for v in values], _winner(metric, values)))
        at_best = [_at_best(run, metric) for run in runs]
        if any(best not in (None, newest) for best, newest in zip(at_best, values, strict=True)):
            name = f"{named(metric)}, best checkpoint"
            rows.append((name, [value_text(metric, v) for v in at_best], _winner(metric, at_best)))
    if any(run.metrics for run in runs):
        counts = [last(numbers(run.metrics, "num_images")) for run in runs]
        rows.append(("Pictures measured", [written(v, "{:,.0f}") for v in counts], None))
    text = (
        "Where each run has got to. Lately is the mean of the last tenth of a run; bold is the better figure. Quality "
        "compares only where the number of pictures, the crop and the resizing are the same."
    )
    return part("Figures", text, _table(runs, rows))


def _times(value: Value, factor: float) -> Value:
    return None if value is None else factor * value


def _time(run: Run) -> str:
    elapsed = max((v for v in run.column("elapsed_s") if v is not None), default=None)
    return "" if elapsed is None else duration(elapsed)


def _measured(runs: Sequence[Run]) -> list[str]:
    """Metrics that some run has a value of, in their usual order."""
    return [m for m in METRICS if any(last(numbers(run.metrics, m)) is not None for run in runs)]


def _at_best(run: Run, metric: str) -> Value:
    index = best_row(run.metrics)
    return None if index is None else numbers(run.metrics, metric)[index]


def _winner(metric: str, values: Sequence[Value]) -> int | None:
    """The run with the better value; None where fewer than two have one, or where it is shared."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return None
    best = min(known) if METRICS[metric] == "lower" else max(known)
    return values.index(best) if known.count(best) == 1 else None


def _settings(runs: Sequence[Run]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - set(_PLACES))
    differing = [key for key in keys if len({settings.get(key) for settings in flat}) > 1]
    text = "Only what differs; a dash stands where a run's settings do not have the key, as those of another version."
    if not differing:
        return part("Settings", text, empty("The settings are the same."))
    return part("Settings", text, _table(runs, [(key, [s.get(key, "") for s in flat], None) for key in differing]))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = plain(value)
    return result


def _pictures(runs: Sequence[Run]) -> str:
    text = (
        "The newest grid of each run's fixed latents. Runs of one seed and latent length start from the same latents."
    )
    newest = [run.fakes for run in runs]
    body = _side_by_side(runs, newest)
    known = [frame.images_seen for frame in newest if frame]
    if len(set(known)) > 1:
        common = min(known)
        early = [min(run.growth, key=lambda frame: abs(frame.images_seen - common), default=None) for run in runs]
        text += " Below, the grids nearest to the shortest run's length."
        body += _side_by_side(runs, early)
    return part("Pictures", text, body)


def _side_by_side(runs: Sequence[Run], frames: Sequence[Frame | None]) -> str:
    shown = "".join(
        f'<figure><img src="{frame.uri}" alt="Grid of pictures by {escape(run.name)}"><figcaption>{escape(run.name)} '
        f"<span>after {frame.images_seen:,} images</span></figcaption></figure>"
        if frame
        else f"<figure>{empty('No pictures yet.')}<figcaption>{escape(run.name)}</figcaption></figure>"
        for run, frame in zip(runs, frames, strict=True)
    )
    return f'<div class="grids">{shown}</div>'


def _metrics(runs: Sequence[Run]) -> str:
    text = (
        "Measured while the runs trained, on their averaged generators. A ring marks the checkpoint kept as the best."
    )
    measured = _measured(runs)
    if not measured:
        return part("Quality", text, empty("Not measured while they trained (eval.every_images is 0)."))
    charts = []
    for metric in measured:
        lines = [
            Line(
                name=run.name, style=style, xs=positions(run.metrics), values=numbers(run.metrics, metric),
                best=best_row(run.metrics),
            )
            for run, style in zip(runs, STYLES, strict=False)
        ]  # fmt: skip
        charts.append((named(metric), drawn(NAMES[metric], lines, scale_of(metric, 3), raw=False)))
    return part("Quality", text, _titled(charts))


def _curves(runs: Sequence[Run]) -> str:
    shares = Scale(digits=0, suffix="%", top=SHARE.top, guide=SHARE.guide, x_ticks=3)
    wanted = (
        ("Loss D", "loss_d", Scale(x_ticks=3), 1),
        ("Loss G", "loss_g", Scale(x_ticks=3), 1),
        ("D(x)", "d_real", shares, 100),
        ("D(G(z)) before", "d_fake_before", shares, 100),
        ("Spread against photographs", "diversity", Scale(digits=0, suffix="%", guide=100, x_ticks=3), 100),
        ("Images a second", "images_per_s", Scale(digits=0, x_ticks=3), 1),
    )
    charts = []
    for title, key, scale, factor in wanted:
        lines = [
            Line(name=run.name, style=style, xs=run.seen, values=[_times(v, factor) for v in run.column(key)])
            for run, style in zip(runs, STYLES, strict=False)
        ]
        charts.append((title, drawn(title, lines, scale, raw=False)))
    text = (
        "Smoothed, over images seen. The contest and the losses tell a healthy run from a lost one, not a good picture."
    )
    return part("Curves", text, _titled(charts))


def _titled(charts: Sequence[tuple[str, str]]) -> str:
    return f'<div class="twin">{"".join(f"<div><h3>{escape(name)}</h3>{text}</div>" for name, text in charts)}</div>'
