"""What the pages of a run and of several runs share: the frame of a page, its sections, tables, and how values read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from pipeline.report_charts import NONE, Line, Scale, Value, chart

STATES = {"running": "Running", "finished": "Finished", "preempted": "Preempted", "failed": "Failed"}
SHARE = Scale(digits=0, suffix="%", top=100, guide=50)
HERE = Path(__file__).parent

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever the page would fetch."""


def document(title: str, body: str, footer: str) -> str:
    """A whole page as HTML text that needs nothing beside itself."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{(HERE / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} {escape(footer)}</footer>
<script>
{(HERE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def part(title: str, text: str, body: str, verdict: str = "") -> str:
    """A section: what is shown on the left, what it shows on the right."""
    told = f'<p class="verdict">{escape(verdict)}</p>' if verdict else ""
    about = f'<div class="about"><h2>{escape(title)}</h2><p>{escape(text)}</p>{told}</div>'
    return f"<section>{about}<div>{body}</div></section>"


def empty(text: str) -> str:
    """What stands where there is nothing to show yet."""
    return f'<p class="empty">{escape(text)}</p>'


def drawn(title: str, lines: Sequence[Line], scale: Scale, *, raw: bool = True) -> str:
    """The chart of those lines that have values; a sentence where none has.  See `chart`."""
    known = [line for line in lines if any(v is not None for v in line.values)]
    return chart(title, known, scale, raw=raw) if known else empty("Nothing measured yet.")


def table(name: str, values: Mapping[str, Any]) -> str:
    """Names and values, two columns."""
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(plain(v))}</td></tr>" for k, v in values.items())
    return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def plain(value: Any) -> str:
    """A value out of YAML or JSON as a reader sees it."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or NONE
    return NONE if value is None or value == "" else str(value)


def section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values below a key; empty where there are none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def percent(value: Value) -> Value:
    return None if value is None else 100 * value


def last(values: Sequence[Value]) -> Value:
    return next((v for v in reversed(values) if v is not None), None)


def median(values: Sequence[Value]) -> Value:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def recent(values: Sequence[Value]) -> Value:
    """Mean of the last tenth."""
    known = [v for v in values[-max(1, len(values) // 10) :] if v is not None]
    return statistics.fmean(known) if known else None


def written(value: Value, form: str) -> str:
    """The value in this form; nothing where there is none."""
    return "" if value is None else form.format(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
