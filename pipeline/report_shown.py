"""The parts of report.html that show what the generator draws now: ways between latents, nearest photographs."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.report_parts import empty, part
from pipeline.report_run import Made, Run, number


def walks(run: Run, absent: Mapping[str, str]) -> str:
    """Strips of pictures on the way from one latent to another."""
    text = (
        "Each row goes from one random latent to another along the arc between them. A generator that has learned what "
        "faces have in common changes little by little; one that knows a few pictures jumps from one to the next."
    )
    made = run.walks
    if made is None:
        return part("Between latents", text, missing("walks", absent))
    rows = "".join(f'<img src="{uri}" alt="Pictures on the way between two latents">' for uri in made.uris)
    return part("Between latents", text, f'<div class="walks">{rows}</div>{whose(made, "walks", absent)}')


def neighbours(run: Run, absent: Mapping[str, str]) -> str:
    """The samples that lie nearest to photographs, beside these, and how near photographs lie to each other."""
    text = (
        "Does the generator know photographs by heart? Left a sample, right of it the photographs nearest to it, with "
        "their distance: root mean square difference of the pictures made small, in levels of 255. A copy would show "
        "the same picture twice, at a distance near 0; an average face that looks like many is none."
    )
    made = run.neighbours
    if made is None:
        return part("Nearest photographs", text, missing("neighbours", absent))
    shown = made.facts.get("shown")
    rows = []
    for uri, about in zip(made.uris, shown if isinstance(shown, list) else [], strict=False):
        values = about if isinstance(about, dict) else {}
        distances, keys = values.get("distances"), values.get("keys")
        words = [f"{number(d) or 0:.1f}" for d in distances] if isinstance(distances, list) else []
        named = ", ".join(map(str, keys)) if isinstance(keys, list) else ""
        cells = "".join(f"<span>{word}</span>" for word in ["sample", *words])
        rows.append(
            f'<li><img src="{uri}" alt="A sample and the photographs nearest to it" title="{escape(named)}">'
            f"<div>{cells}</div></li>"
        )
    body = f'<ol class="near">{"".join(rows)}</ol>{whose(made, "neighbours", absent)}'
    return part("Nearest photographs", text, body, _judged(made.facts))


def _judged(facts: dict[str, Any]) -> str:
    """What the distances say, in a few sentences."""
    names = ("sample_median", "sample_lowest", "sample_suspects", "photograph_median", "generated", "photographs")
    values = [number(facts.get(name)) for name in names]
    if any(value is None for value in values):
        return ""
    median, lowest, suspects, yardstick, generated, photographs = (value or 0.0 for value in values)
    told = (
        f"Here are the {len(facts.get('shown', []))} of {generated:,.0f} samples that lie nearest to one of "
        f"{photographs:,.0f} photographs{' or its mirror image' if facts.get('mirrored') else ''}. A photograph lies "
        f"{yardstick:.1f} from the nearest other one in the median, a sample {median:.1f} from its nearest photograph, "
        f"the nearest of all {lowest:.1f}. "
    )
    if suspects:
        return f"{told}{suspects:,.0f} lie nearer than half of what photographs keep: look whether they are copies."
    return told + "None lies nearer than half of what photographs keep: no sign of copies."


def missing(name: str, absent: Mapping[str, str]) -> str:
    """Why a picture is not there."""
    return empty(f"Not made: {absent[name]}." if name in absent else "Not made yet: python launch/report.py RUN does.")


def whose(made: Made, name: str, absent: Mapping[str, str]) -> str:
    """The generator that a picture is by, and why it is not a newer one."""
    best = "the best checkpoint" if made.facts.get("best") else "the newest checkpoint"
    old = f" An older picture; none newer was made: {absent[name]}." if name in absent else ""
    whom = f"By the averaged generator of {best}{' then' if old else ''}, after {made.images_seen:,} images.{old}"
    return f'<p class="beyond">{escape(whom)}</p>'
