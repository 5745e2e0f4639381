"""The parts of report.html about quality: curves of the evaluations, the newest in figures, and how varied G draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.config import METRICS
from pipeline.report_charts import NONE, Line, Scale, Value
from pipeline.report_parts import drawn, empty, last, part, percent, plain, recent, section
from pipeline.report_run import Run, number, numbers, positions
from pipeline.report_shown import missing, whose

NAMES = {
    "swd": "SWD",
    "ms_ssim": "MS-SSIM",
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}
DIGITS = {"ms_ssim": 4, "kid": 5, "precision": 3, "recall": 3, "density": 3, "coverage": 3}
ARROWS = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}
CHARTS = (("fid",), ("kid",), ("inception_score",), ("precision", "recall"), ("density", "coverage"))
"""Metrics that are drawn small, beside each other; those of a tuple share a chart."""


def named(metric: str) -> str:
    """A metric as a reader knows it, with an arrow that says which way is better."""
    return f"{NAMES.get(metric, metric)} {ARROWS[METRICS[metric]]}" if metric in METRICS else metric


def scale_of(metric: str, x_ticks: int = 6) -> Scale:
    return Scale(digits=DIGITS.get(metric, 2), x_ticks=x_ticks)


def value_text(metric: str, value: Value) -> str:
    return NONE if value is None else scale_of(metric).text(value)


def best_row(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The evaluation whose checkpoint is kept as the best: the last that was called so."""
    return next((i for i in range(len(rows) - 1, -1, -1) if rows[i].get("best") is True), None)


def quality(run: Run) -> str:
    """Curves of metrics.jsonl, and below them the newest evaluation of launch/evaluate.py."""
    text = (
        "How far the pictures are from photographs, measured on the averaged generator; an arrow says which way is "
        "better. Figures compare only where the number of pictures, the crop and the resizing are the same."
    )
    if not run.metrics and not run.evaluation:
        how = "--eval.every_images N measures while it trains, python launch/evaluate.py RUN at any time"
        return part("Quality", text, empty(f"Not measured: {how}."))
    body = _curves(run) if run.metrics else empty("Not measured while it trained (eval.every_images is 0).")
    return part("Quality", text, body + _evaluation(run.evaluation), _standing(run))


def _curves(run: Run) -> str:
    known = {key for row in run.metrics for key in row}
    levels = sorted((k for k in known if re.fullmatch(r"swd_\d+", k)), key=lambda k: -int(k[4:]))
    shown = []
    if "swd" in known:
        lines = [_line(run, "swd", named("swd"), "one", marked=True)]
        styles = ("two", "three", "four", "five")
        if len(levels) > 1:  # the only one of a small picture is the whole
            lines += [_line(run, key, f"{key[4:]} px", style) for key, style in zip(levels, styles, strict=False)]
        shown.append(drawn("Sliced Wasserstein distance, and its levels", lines, scale_of("swd")))
    small = [
        drawn(
            " and ".join(NAMES[m] for m in together),
            [
                _line(run, m, named(m), style, marked=True)
                for m, style in zip(together, ("one", "two"), strict=False)
                if m in known
            ],
            scale_of(together[0], 3),
        )
        for together in CHARTS
        if known & set(together)
    ]
    if small:
        shown.append(f'<div class="twin">{"".join(small)}</div>')
    return "".join(shown)


def _line(run: Run, key: str, name: str, style: str, *, marked: bool = False) -> Line:
    best = best_row(run.metrics) if marked else None
    return Line(name=name, style=style, xs=positions(run.metrics), values=numbers(run.metrics, key), best=best)


def _standing(run: Run) -> str:
    """The newest evaluation and the best one in words."""
    if not run.metrics:
        return ""
    metric = str(section(run.config, "eval").get("best") or "swd")
    newest, index = run.metrics[-1], best_row(run.metrics)
    count = number(newest.get("num_images"))
    told = f"Of {count:,.0f} pictures each time. " if count else ""
    if index is None:
        return told.strip()
    best = run.metrics[index]
    name = NAMES.get(metric, metric)
    figure = value_text(metric, number(best.get(metric)))
    told += f"The ring marks the checkpoint that is kept as the best: {name} {figure} after {_images(best)}"
    if best is newest:
        return told + ", the newest."
    return f"{told}; the newest has {value_text(metric, number(newest.get(metric)))} after {_images(newest)}."


def _images(row: Mapping[str, Any]) -> str:
    return f"{number(row.get('images_seen')) or 0:,.0f} images"


def _evaluation(row: Mapping[str, Any]) -> str:
    """The last line of evaluations.jsonl as a table: each metric, and below what makes the figures comparable."""
    figures = section(row, "metrics") or row
    metrics = [m for m in METRICS if number(figures.get(m)) is not None]
    if not metrics:
        return ""
    cells = [(named(m), value_text(m, number(figures[m]))) for m in metrics]
    if number(figures.get("ms_ssim_real")) is not None:
        cells.append(("MS-SSIM of photographs", value_text("ms_ssim", number(figures["ms_ssim_real"]))))
    values = "".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in cells)
    kept = ("images_seen", "num_images")
    told = {k: v for k, v in row.items() if k in kept or (k != "metrics" and number(v) is None and v != "")}
    facts = "".join(
        f"<tr><th>{escape(k.replace('_', ' '))}</th><td>{escape(plain(v))}</td></tr>" for k, v in told.items()
    )
    return (
        f'<div class="twin facts"><table><caption>Evaluated by launch/evaluate.py</caption>{values}</table>'
        f"<table><caption>What these figures compare with</caption>{facts}</table></div>"
    )


def diversity(run: Run, absent: Mapping[str, str]) -> str:
    """How much the pictures differ from each other: two curves, and a larger grid of random samples."""
    text = (
        "Whether the generator draws many pictures or one: the spread of its pixels within a batch as a share of the "
        "photographs' (100%: as varied), and the mean MS-SSIM of pairs, which is higher where pictures are more alike."
    )
    spread = Line(
        name="Spread against photographs",
        style="four",
        xs=run.seen,
        values=[percent(v) for v in run.column("diversity")],
    )
    curves = []
    if last(spread.values) is not None:
        curves.append(
            drawn("Spread of generated pictures", [spread], Scale(digits=0, suffix="%", guide=100, x_ticks=3))
        )
    pairs = [
        _line(run, "ms_ssim", named("ms_ssim"), "one", marked=True),
        _line(run, "ms_ssim_real", "photographs", "two"),
    ]
    if any(last(line.values) is not None for line in pairs):
        curves.append(drawn("MS-SSIM of pairs", pairs, scale_of("ms_ssim", 3)))
    body = f'<div class="twin">{"".join(curves)}</div>' if curves else ""
    made = run.samples
    if made is None:
        body += missing("samples", absent)
    else:
        count = number(made.facts.get("count")) or 0
        image = f'<img class="many" src="{made.uris[0]}" alt="{count:.0f} random samples">'
        body += f"{image}{whose(made, 'samples', absent)}"
    return part("Diversity", text, body, _how_varied(pairs, recent(spread.values)))


def _how_varied(pairs: Sequence[Line], spread: Value) -> str:
    fake, real = (last(line.values) for line in pairs)
    told = f"Lately the spread is {spread:.0f}% of the photographs'. " if spread is not None else ""
    if fake is not None and real is not None:
        told += f"Pairs of generated pictures have MS-SSIM {fake:.3f}, pairs of photographs {real:.3f}: "
        if fake > real + 0.05:
            told += "the generator draws pictures that are more alike."
        else:
            told += "no sign that the generator draws fewer kinds of pictures."
    return told.strip()
