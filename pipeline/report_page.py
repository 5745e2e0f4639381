"""The layout of report.html: each function below is a part of the page, from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from pipeline.report_charts import NONE, Line, Scale, Value
from pipeline.report_metrics import diversity, quality
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
    percent,
    plain,
    recent,
    section,
    table,
    written,
)
from pipeline.report_run import Run, number
from pipeline.report_shown import neighbours, walks


def page(run: Run, absent: Mapping[str, str]) -> str:
    """The whole page as HTML text.

    Args:
        absent: why a picture of RUN/report/ is not there or is an older one, by its name.
    """
    parts = [_header(run), _figures(run), _pictures(run), _growth(run), _curves(run), quality(run)]
    parts += [diversity(run, absent), walks(run, absent), neighbours(run, absent), _settings(run), _environment(run)]
    return document(f"{run.name} - DCGAN run", "\n".join(parts), "from what the run had recorded until then.")


def _header(run: Run) -> str:
    state = str(run.status.get("state", ""))
    known = state if state in STATES else "unknown"
    label = STATES.get(state, state or "State unknown")
    seen, total = run.images_seen, number(run.status.get("total_images"))
    progress = ""
    if seen is not None and total:
        share = min(100.0, 100 * seen / total)
        progress = (
            f'<div class="progress"><div class="bar"><i style="width:{share:.1f}%"></i></div>'
            f"<p>{seen:,.0f} of {total:,.0f} images <b>{share:.{0 if share >= 10 else 1}f}%</b></p></div>"
        )
    reason = str(run.status.get("reason") or "")
    if state == "finished" and reason == "all images seen":
        reason = ""
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
    config = run.config
    data, model, train, optim = (section(config, key) for key in ("data", "model", "train", "optim"))
    parts = []
    if "dataroot" in data:
        parts.append(Path(str(data["dataroot"])).name)
    size = data.get("image_size")
    if size:
        sides = size if isinstance(size, list) else [size]
        parts.append(f"{sides[0]} \N{MULTIPLICATION SIGN} {sides[-1]} pixels")
    for settings, key, text in (
        (model, "nz", "latent of {}"),
        (train, "batch_size", "batch of {}"),
        (optim, "lr", "learning rate {}"),
    ):
        if key in settings:
            parts.append(text.format(settings[key]))
    return " · ".join(parts)


def _figures(run: Run) -> str:
    status = run.status
    rate, wait = median(run.column("images_per_s")), median(run.column("data_wait_percent"))
    elapsed = max((v for v in run.column("elapsed_s") if v is not None), default=None)
    epoch = last(run.column("epoch"))
    seen = run.images_seen
    ranks = number(status.get("world_size"))
    figures = [
        ("Images seen", written(seen, "{:,.0f}"), written(epoch, "{:,.1f} epochs")),
        ("Images a second", written(rate, "{:,.0f}"), written(rate, "median")),
        ("Time", "" if elapsed is None else duration(elapsed), written(elapsed, "training")),
        ("Data wait", written(wait, "{:.1f}%"), written(wait, "median, of the step")),
        ("Precision", status.get("precision"), status.get("mode") and f"{status['mode']} step"),
        ("Ranks", written(ranks, "{:.0f}"), _hardware(run)),
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
            remarks.append(f"after {written(number(event.get('images_seen')), '{:,.0f}')} images: {event.get('text')}")
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
        shown.append(empty("The first generated pictures are still to come."))
    text = (
        "Photographs as the discriminator sees them, and what the generator draws from latents that stay the same all "
        "through the run."
    )
    return part("Real beside generated", text, f'<div class="pair">{"".join(shown)}</div>')


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
    return part("Growth", text, body)


PLAY = '<svg class="play" viewBox="0 0 16 16"><path d="M4 2.5v11l9.5-5.5z"/></svg>'
PAUSE = '<svg class="pause" viewBox="0 0 16 16"><path d="M3.5 2.5h3v11h-3zm6 0h3v11h-3z"/></svg>'


def _curves(run: Run) -> str:
    if not run.stats:
        text = "Losses, the discriminator's judgement and the speed appear here with the first line of stats.jsonl."
        return part("Curves", text, empty("Nothing measured yet."))
    return _losses(run) + _contest(run) + _speed(run)


def _losses(run: Run) -> str:
    xs = run.seen
    lines = [
        Line(name="Loss D", style="one", xs=xs, values=run.column("loss_d")),
        Line(name="Loss G", style="two", xs=xs, values=run.column("loss_g")),
    ]
    text = "Of the discriminator, real and generated summed, and of the generator. They measure a contest: neither "
    if section(run.config, "loss").get("kind", "bce") == "bce":
        text += "falls for ever, and one that stays at 0 means that the other side has lost."
    else:
        text += "falls for ever."
    return part("Losses", text, drawn("Losses of discriminator and generator", lines, Scale()))


def _contest(run: Run) -> str:
    xs = run.seen
    real, before, after = ([percent(v) for v in run.column(k)] for k in ("d_real", "d_fake_before", "d_fake_after"))
    lines = [
        Line(name="D(x)", style="one", xs=xs, values=real),
        Line(name="D(G(z)) before", style="two", xs=xs, values=before),
        Line(name="D(G(z)) after", style="three", xs=xs, values=after),
    ]
    text = (
        "How likely the discriminator holds a photograph, D(x), and a generated picture, D(G(z)), to be real; the "
        "latter before and after its own step. Where the curves meet at 50% it can only guess."
    )
    verdict = _verdict(recent(real), recent(before))
    return part("Who is winning", text, drawn("D(x) against D(G(z))", lines, SHARE), verdict)


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
    xs = run.seen
    rate = [Line(name="Images a second", style="four", xs=xs, values=run.column("images_per_s"))]
    wait = [Line(name="Data wait", style="five", xs=xs, values=run.column("data_wait_percent"))]
    text = "Trained images a second over all ranks, and the share of a step spent waiting for its images."
    body = (
        f'<div class="twin">{drawn("Images a second", rate, Scale(digits=0, x_ticks=3))}'
        f"{drawn('Share of a step spent waiting for data', wait, Scale(digits=1, suffix='%', x_ticks=3))}</div>"
    )
    return part("Speed", text, body)


def _settings(run: Run) -> str:
    config = run.config
    if not config:
        return ""
    whole = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = [(k, v) for k, v in config.items() if isinstance(v, dict)] + ([("other", whole)] if whole else [])
    body = "".join(table(name, values) for name, values in groups)
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
    body = "".join(table(name, values) for name, values in groups)
    return f"<details><summary>Environment</summary>{line}<div class=columns>{body}</div></details>"


def _hardware(run: Run) -> str:
    """The processor that did the work, for the key figures: '8 x NVIDIA H200', or the CPU's name."""
    hardware = section(run.env, "hardware")
    gpus = hardware.get("gpus")
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} x {plain(gpus[0])}"
    return plain(hardware["cpu"]) if hardware.get("cpu") else ""
