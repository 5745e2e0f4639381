"""Pictures that the report makes of a run's generator: random samples, ways between latents, nearest photographs.

They lie in RUN/report/, each a PNG with its facts as JSON, and are made once for a checkpoint: the best where one is
marked, else the newest.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, ConfigError
from pipeline.decode import Pixels
from pipeline.errors import StorageError, UserError
from pipeline.files import read_object, written_aside
from pipeline.philox import Stream
from pipeline.pictures import grid, save_png
from pipeline.report_neighbours import Photographs, look_up, open_photographs
from pipeline.sampling import generate, latents, recalibrated, slerp

FORMAT = 1
"""Of the files; others are made anew."""
GENERATED = 256
"""Random samples, all of which are held against the photographs."""
SHOWN = 144
"""Of them, how many are seen."""
WALKS, STEPS = 5, 9
"""Ways between two latents, and pictures on each."""
SUSPECTS = 16
"""Samples that are shown beside their nearest photographs: those that are the nearest."""
AT_END_KEPT, AT_END_DECODED = 210_000, 8_000
"""Most photographs that the end of a training run looks through: decoded ones in the cache, or files."""


def refresh(run: Path, *, dataroot: str = "", at_end: bool = False) -> dict[str, str]:
    """Makes what is not there yet or belongs to another checkpoint.

    Args:
        run: folder of a run.
        dataroot: where the photographs are, if not where the run's settings say.
        at_end: a training run waits for it; photographs are looked through only where that takes seconds.

    Returns:
        Why a picture could not be made, by its name: a run without a checkpoint or photographs has a report too.
    """
    try:
        found = _checkpoint(run)
    except StorageError as error:
        return dict.fromkeys(("samples", "walks", "neighbours"), _one_line(error))
    facts = {
        "format": FORMAT,
        "checkpoint": found.folder.name,
        "sum": found.manifest["files"]["state.pt"]["sha256"],
        "images_seen": found.images_seen,
        "best": checkpoints.best(run) == found.folder.name,
    }
    wanted = [name for name in ("samples", "walks", "neighbours") if not _is_kept(run, name, facts)]
    absent: dict[str, str] = {}
    try:
        if wanted:
            _make(run, found, facts, wanted, dataroot, at_end, absent)
    except StorageError as error:
        absent |= {name: _one_line(error) for name in wanted if name not in absent}
    return absent


def _checkpoint(run: Path) -> Checkpoint:
    """The best, or where none is marked or it is damaged, the newest."""
    try:
        return checkpoints.chosen(run, "best", lambda _: None)
    except StorageError:
        if not checkpoints.folders(run):
            raise StorageError("the run has no checkpoint yet") from None
        return checkpoints.chosen(run, "last", lambda _: None)


def _is_kept(run: Path, name: str, facts: dict[str, Any]) -> bool:
    kept = read_object(run / "report" / f"{name}.json")
    same = all(kept.get(key) == facts[key] for key in ("format", "sum", "images_seen", "best"))
    return same and (run / "report" / f"{name}.png").exists()


def _make(
    run: Path,
    found: Checkpoint,
    facts: dict[str, Any],
    wanted: list[str],
    dataroot: str,
    at_end: bool,
    absent: dict[str, str],
) -> None:
    photographs = None
    generator, cfg, _ = checkpoints.open_generator(found.folder)
    if "neighbours" in wanted:
        try:
            photographs = _photographs(cfg, found, dataroot, at_end)
        except (ConfigError, UserError) as error:
            absent["neighbours"] = _one_line(error)
            if wanted == ["neighbours"]:
                return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    still = recalibrated(generator.to(device), cfg.model.nz, images=512)

    def drawn(start: int, count: int) -> torch.Tensor:
        return latents(0, Stream.SAMPLE_LATENT, start, count, cfg.model.nz, device)

    samples = generate(still, drawn(0, GENERATED))
    if "samples" in wanted:
        _keep(run, "samples", grid(samples[:SHOWN]), facts | {"count": SHOWN})
    if "walks" in wanted:
        ends = drawn(GENERATED, 2 * WALKS)
        ways = [slerp(ends[0::2], ends[1::2], i / (STEPS - 1)) for i in range(STEPS)]
        pictures = generate(still, torch.stack(ways, dim=1).flatten(0, 1))
        _keep(run, "walks", grid(pictures, STEPS), facts | {"rows": WALKS, "steps": STEPS})
    if photographs:
        try:
            picture, about = _neighbours(samples.numpy(), photographs)
        except UserError as error:
            absent["neighbours"] = _one_line(error)
        else:
            _keep(run, "neighbours", picture, facts | about)


def _photographs(cfg: Config, found: Checkpoint, dataroot: str, at_end: bool) -> Photographs:
    """Those that the run was trained on.

    Raises:
        ConfigError, UserError: they are not at hand, too few, or at the end of training too many.
    """
    settings = dataclasses.replace(cfg.data, dataroot=dataroot or cfg.data.dataroot)
    result = open_photographs(settings, torch.get_num_threads())
    if result.dataset.fingerprint != found.manifest["identity"].get("dataset"):
        raise UserError(f"{settings.dataroot} holds other photographs than those that the run was trained on")
    if len(result) < 2:
        raise UserError("one photograph has no other one to be compared with")
    if at_end and len(result) > (AT_END_KEPT if result.decoded else AT_END_DECODED):
        raise UserError(
            f"looking through {len(result):,} photographs takes a while; `python launch/report.py RUN` does it"
        )
    return result


def _neighbours(samples: Pixels, photographs: Photographs) -> tuple[Image.Image, dict[str, Any]]:
    """The samples that are nearest to a photograph, each in a row with its neighbours, and the distances of all."""
    found, yardstick = look_up(samples, photographs)
    suspects = np.argsort(found.distances[:, 0], kind="stable")[:SUSPECTS]
    count = found.items.shape[1]
    theirs = photographs.take(found.items[suspects].ravel()).reshape(len(suspects), count, *samples.shape[1:])
    rows = np.concatenate([samples[suspects, None], theirs], axis=1)
    picture = grid(torch.from_numpy(rows.reshape(-1, *samples.shape[1:])), 1 + count)
    index = photographs.dataset
    return picture, {
        "rows": len(rows),
        "photographs": len(photographs),
        "generated": len(samples),
        "mirrored": photographs.cfg.flip,
        "sample_lowest": float(found.distances[:, 0].min()),
        "sample_median": float(np.median(found.distances[:, 0])),
        "sample_suspects": int((found.distances[:, 0] < 0.5 * np.median(yardstick)).sum()),
        "photograph_median": float(np.median(yardstick)),
        "shown": [
            {"distances": found.distances[i].tolist(), "keys": [index.key(item) for item in found.items[i].tolist()]}
            for i in suspects
        ],
    }


def _keep(run: Path, name: str, picture: Image.Image, facts: dict[str, Any]) -> None:
    """The facts come last, because they are what makes the picture count.

    Raises:
        StorageError: the disk refused.
    """
    path = run / "report" / f"{name}.json"
    path.unlink(missing_ok=True)
    save_png(picture, path.with_suffix(".png"))
    with written_aside(path) as aside:
        aside.write_text(json.dumps(facts))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
