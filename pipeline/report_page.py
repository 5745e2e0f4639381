"""The layout of report.html: each function below is a part of the page, from top to bottom."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from pipeline.report_charts import NONE, Line, Scale, Value, chart
from pipeline.report_run import Run

STATES = {"running": "Running", "finished": "Finished", "preempted": "Preempted", "failed": "Failed"}
SHARE = Scale(digits=0, suffix="%", top=100, guide=50)
HERE = Path(__file__).parent

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever the page would fetch."""


def page(run: Run) -> str:
    """The whole page as HTML text."""
    parts = (_header, _figures, _pictures, _growth, _curves, _settings, _environment)
    body = "\n".join(part(run) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(run.name)} - DCGAN run</title>
<style>
{(HERE / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} from what the run had recorded until then.</footer>
<script>
{(HERE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _header(run: Run) -> str:
    state = str(run.status.get("state", ""))
    known = state if state in STATES else "unknown"
    label = STATES.get(state, state or "State unknown")
    seen, total = _images_seen(run), _number(run.status.get("total_images"))
    progress = ""
    if seen is not None and total:
        share = min(100.0, 100 * seen / total)
        progress = (
            f'<div class="progress"><div class="bar"><i style="width:{share:.1f}%"></i></div>'
            f"<p>{seen:,.0f} of {total:,.0f} images <b>{share:.{0 if share >= 10 else 1}f}%</b></p></div>"
        )
    reason = "" if state == "finished" else str(run.status.get("reason") or "")
    exit_code = run.status.get("exit_code")
    why = f"{reason} (exit code {exit_code})" if reason and exit_code else reason
    alert = f'<p class="alert {known}">{escape(why)}</p>' if why else ""
    return f"""<header>
<p class="kicker">DCGAN training run <span class="state {known}">{escape(label)}</span></p>
<h1>{escape(run.name)}</h1>
<p class="lead">{escape(_summary(run))}</p>
{progress}
{alert}
</header>"""


def _summary(run: Run) -> str:
    """What was trained on what, in one line; only what the config tells."""
    config = _config(run)
    data, model, train, optim = (_section(config, key) for key in ("data", "model", "train", "optim"))
    parts = []
    if "dataroot" in data:
        parts.append(Path(str(data["dataroot"])).name)
    size = data.get("image_size")
    if size:
        sides = size if isinstance(size, list) else [size]
        parts.append(f"{sides[0]} \N{MULTIPLICATION SIGN} {sides[-1]} pixels")
    for section, key, text in (
        (model, "nz", "latent of {}"),
        (train, "batch_size", "batch of {}"),
        (optim, "lr", "learning rate {}"),
    ):
        if key in section:
            parts.append(text.format(section[key]))
    return " · ".join(parts)


def _figures(run: Run) -> str:
    status = run.status
    rate, wait = _median(run.column("images_per_s")), _median(run.column("data_wait_percent"))
    elapsed = max((v for v in run.column("elapsed_s") if v is not None), default=None)
    epoch = _last(run.column("epoch"))
    seen = _images_seen(run)
    ranks = _number(status.get("world_size"))
    figures = [
        ("Images seen", _text(seen, "{:,.0f}"), _text(epoch, "{:,.1f} epochs")),
        ("Images a second", _text(rate, "{:,.0f}"), _text(rate, "median")),
        ("Time", "" if elapsed is None else _duration(elapsed), _text(elapsed, "training")),
        ("Data wait", _text(wait, "{:.1f}%"), _text(wait, "median, of the step")),
        ("Precision", status.get("precision"), status.get("mode") and f"{status['mode']} step"),
        ("Ranks", _text(ranks, "{:.0f}"), _hardware(run)),
        ("Decoder", status.get("decoder"), ""),
        ("Cache", status.get("cache"), ""),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value or NONE))}</dd><dd>{escape(str(aside or ''))}</dd></div>"
        for name, value, aside in figures
    )
    fallbacks = status.get("fallbacks")
    remarks = [str(f) for f in fallbacks] if isinstance(fallbacks, list) else []
    events = status.get("events")
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict):
            remarks.append(f"after {_text(_number(event.get('images_seen')), '{:,.0f}')} images: {event.get('text')}")
    items = "".join(f"<li>{escape(text)}</li>" for text in remarks + run.notes)
    notes = f'<ul class="notes">{items}</ul>' if items else ""
    return f'<section class="figures"><dl>{cells}</dl>{notes}</section>'


def _pictures(run: Run) -> str:
    shown = []
    if run.reals:
        shown.append(f'<figure><img src="{run.reals}" alt="Grid of photographs"><figcaption>Real</figcaption></figure>')
    if run.fakes:
        image = f'<img src="{run.fakes.uri}" alt="Grid of generated pictures">'
        caption = f"Generated <span>after {run.fakes.images_seen:,} images</span>"
        shown.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    else:
        shown.append('<p class="empty">The first generated pictures are still to come.</p>')
    text = (
        "Photographs as the discriminator sees them, and what the generator draws from latents that stay the same all "
        "through the run."
    )
    return _part("Real beside generated", text, f'<div class="pair">{"".join(shown)}</div>')


def _growth(run: Run) -> str:
    if len(run.growth) < 2:
        return ""
    last = len(run.growth) - 1
    frames = "".join(
        f'<img src="{f.uri}" alt="After {f.images_seen:,} images" data-images="{f.images_seen:,}"'
        f"{' class=on' if i == last else ''}>"
        for i, f in enumerate(run.growth)
    )
    strip = ""
    if run.strip:
        rows = "".join(
            f"<li><span>{f.images_seen:,}</span>"
            f'<img src="{f.uri}" alt="First faces after {f.images_seen:,} images"></li>'
            for f in run.strip
        )
        strip = f'<ol class="strip">{rows}</ol>'
    body = f"""<div class="{"growth" if strip else "growth alone"}"><div class="player">
<div class="stack">{frames}</div>
<div class="controls"><button type="button" aria-label="Play">{PLAY}{PAUSE}</button>
<input type="range" min="0" max="{last}" value="{last}" aria-label="Moment of the training">
<output>{run.growth[-1].images_seen:,} images</output></div></div>{strip}</div>"""
    text = "The same latents at moments of the training: each place in the grid is one face coming into being."
    return _part("Growth", text, body)


PLAY = '<svg class="play" viewBox="0 0 16 16"><path d="M4 2.5v11l9.5-5.5z"/></svg>'
PAUSE = '<svg class="pause" viewBox="0 0 16 16"><path d="M3.5 2.5h3v11h-3zm6 0h3v11h-3z"/></svg>'


def _curves(run: Run) -> str:
    if not run.stats:
        text = "Losses, the discriminator's judgement and the speed appear here with the first line of stats.jsonl."
        return _part("Curves", text, '<p class="empty">Nothing measured yet.</p>')
    return _losses(run) + _contest(run) + _speed(run)


def _losses(run: Run) -> str:
    lines = [
        Line(name="Loss D", style="one", values=run.column("loss_d")),
        Line(name="Loss G", style="two", values=run.column("loss_g")),
    ]
    text = (
        "Of the discriminator, real and generated summed, and of the generator. They measure a contest: neither falls "
        "for ever, and one that stays at 0 means that the other side has lost."
    )
    return _part("Losses", text, _chart(run, "Losses of discriminator and generator", lines, Scale()))


def _contest(run: Run) -> str:
    real, before, after = ([_percent(v) for v in run.column(k)] for k in ("d_real", "d_fake_before", "d_fake_after"))
    lines = [
        Line(name="D(x)", style="one", values=real),
        Line(name="D(G(z)) before", style="two", values=before),
        Line(name="D(G(z)) after", style="three", values=after),
    ]
    text = (
        "How likely the discriminator holds a photograph, D(x), and a generated picture, D(G(z)), to be real; the "
        "latter before and after its own step. Where the curves meet at 50% it can only guess."
    )
    verdict = _verdict(_recent(real), _recent(before))
    return _part("Who is winning", text, _chart(run, "D(x) against D(G(z))", lines, SHARE), verdict)


def _verdict(real: Value, fake: Value) -> str:
    """What the last tenth of the run says about the contest, in a sentence."""
    if real is None or fake is None:
        return ""
    gap = real - fake
    if gap > 90:
        meaning = "The discriminator hardly errs; the generator has little left to learn from."
    elif gap > 50:
        meaning = "The discriminator is well ahead, and still teaches the generator."
    elif gap > 15:
        meaning = "The discriminator is ahead, but it errs often."
    elif gap > -5:
        meaning = "The discriminator can hardly tell them apart."
    else:
        meaning = "The discriminator takes generated pictures for the real ones: something is wrong."
    return f"Lately {real:.0f}% for photographs against {fake:.0f}% for generated pictures. {meaning}"


def _speed(run: Run) -> str:
    rate = [Line(name="Images a second", style="four", values=run.column("images_per_s"))]
    wait = [Line(name="Data wait", style="five", values=run.column("data_wait_percent"))]
    text = "Trained images a second over all ranks, and the share of a step spent waiting for its images."
    body = (
        f'<div class="twin">{_chart(run, "Images a second", rate, Scale(digits=0, x_ticks=3))}'
        f"{_chart(run, 'Share of a step spent waiting for data', wait, Scale(digits=1, suffix='%', x_ticks=3))}</div>"
    )
    return _part("Speed", text, body)


def _chart(run: Run, title: str, lines: list[Line], scale: Scale) -> str:
    if not any(v is not None for line in lines for v in line.values):
        return '<p class="empty">Nothing measured yet.</p>'
    xs = [v for v in run.column("images_seen") if v is not None]
    return chart(title, xs, lines, scale)


def _settings(run: Run) -> str:
    config = _config(run)
    if not config:
        return ""
    whole = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = [(k, v) for k, v in config.items() if isinstance(v, dict)] + ([("other", whole)] if whole else [])
    body = "".join(_table(name, values) for name, values in groups)
    return f"<details><summary>Settings</summary><div class=columns>{body}</div></details>"


def _environment(run: Run) -> str:
    if not run.env:
        return ""
    plain = {k: v for k, v in run.env.items() if not isinstance(v, dict) and k != "command"}
    command = run.env.get("command")
    words = command if isinstance(command, list) else [command or ""]
    line = f"<pre>{escape(' '.join(str(w) for w in words))}</pre>" if command else ""
    groups = [("source", plain)] if plain else []
    groups += [(k, v) for k, v in run.env.items() if isinstance(v, dict)]
    body = "".join(_table(name, values) for name, values in groups)
    return f"<details><summary>Environment</summary>{line}<div class=columns>{body}</div></details>"


def _table(name: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in values.items())
    return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or NONE
    return NONE if value is None or value == "" else str(value)


def _part(title: str, text: str, body: str, verdict: str = "") -> str:
    told = f'<p class="verdict">{escape(verdict)}</p>' if verdict else ""
    about = f'<div class="about"><h2>{escape(title)}</h2><p>{escape(text)}</p>{told}</div>'
    return f"<section>{about}<div>{body}</div></section>"


def _config(run: Run) -> dict[str, Any]:
    """The config as nested texts: BaseLoader leaves 2e-4 and true as they were written."""
    try:
        config = yaml.load(run.config_text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        return {"config.yaml": f"could not be read: {error}"}
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _hardware(run: Run) -> str:
    """The processor that did the work, for the key figures: '8 x NVIDIA H200', or the CPU's name."""
    hardware = _section(run.env, "hardware")
    gpus = hardware.get("gpus")
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} x {_plain(gpus[0])}"
    return _plain(hardware["cpu"]) if hardware.get("cpu") else ""


def _images_seen(run: Run) -> Value:
    seen = _number(run.status.get("images_seen"))
    return _last(run.column("images_seen")) if seen is None else seen


def _number(value: Any) -> Value:
    return float(value) if isinstance(value, int | float) else None


def _percent(value: Value) -> Value:
    return None if value is None else 100 * value


def _last(values: list[Value]) -> Value:
    return next((v for v in reversed(values) if v is not None), None)


def _median(values: list[Value]) -> Value:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _recent(values: list[Value]) -> Value:
    """Mean of the last tenth."""
    known = [v for v in values[-max(1, len(values) // 10) :] if v is not None]
    return statistics.fmean(known) if known else None


def _text(value: Value, form: str) -> str:
    return "" if value is None else form.format(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
