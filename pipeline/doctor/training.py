"""A short training on cartoon faces in a temporary folder, by the trainer's own command."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.doctor import ROOT, Check, failed, first_line, ok, size, warning
from pipeline.doctor.ranks import Meeting, Place
from pipeline.errors import Preempted, UserError

NUM_FACES = 64
START_S = 240.0
"""The longest that imports, the first step and the checkpoint may take besides the training itself."""
_NOT_OURS = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "DCGAN_OUTCOME")
"""Variables of this process that would lead its trainer to torchrun's or the wrapper's affairs."""


@dataclass(frozen=True)
class Trained:
    """How the trainer of one rank ended."""

    code: int
    last_words: str
    """The last line it wrote to stderr."""


def trained(folder: Path, seconds: float, place: Place, more: dict[str, str] | None = None) -> Trained:
    """Run the trainer for about so many seconds; the faces are in the folder, the run goes beside them.

    Args:
        more: environment variables of this training.
    """
    batch = max(2, Config().train.batch_size // place.world_size) * place.world_size
    options = {
        "data.dataroot": folder / "faces",
        "data.cache_dir": folder / "cache",
        "run.dir": folder / "run",
        "train.batch_size": batch,
        "train.num_epochs": 1_000_000,
        "train.max_minutes": seconds / 60,
        "checkpoint.every_images": 0,
        "log.every_steps": 20 if _on_gpu() else 1,
        "log.grid_every_images": 0,
        "log.report": "false",
        "distributed.start_timeout_s": 120,
        "distributed.step_timeout_s": 60,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_OURS} | (more or {})
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "train.py"), *words],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + START_S,
        )
    except subprocess.TimeoutExpired:
        return Trained(-1, f"it had not ended {seconds + START_S:.0f} s after its start, and was killed")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return Trained(done.returncode, lines[-1][:300] if lines else "")


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def judged(run: Path, how: dict[int, Trained]) -> tuple[list[Check], dict[str, Any]]:
    """The check, and the same in figures.

    Args:
        how: each rank's trainer.
    """
    from pipeline import checkpoint

    name, advice = "training", "python launch/train.py with your options tells more"
    # Its own time limit has stopped it: 75, which under torchrun is 0.
    bad = [f"rank {rank}: {_ending(each)}" for rank, each in how.items() if each.code not in (0, Preempted.exit_code)]
    if bad:
        return [failed(name, "; ".join(bad[:3]), advice)], {}
    try:
        rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
        passed_over: list[str] = []
        found = checkpoint.newest(run, passed_over.append)
        if found is None:
            return [failed(name, f"it left no good checkpoint {'; '.join(passed_over)}", advice)], {}
        checkpoint.load(found)
    except (OSError, ValueError, UserError) as error:
        return [failed(name, first_line(error), advice)], {}
    settled = rows[max(1, len(rows) // 3) :] or rows  # the first ones warm up
    if not settled:
        advice = "--training-s 60; a machine this slow needs a GPU, or fewer other programs"
        return [warning(name, f"{found.images_seen} images only, too few to tell more", advice)], {}
    rate = statistics.median(row["images_per_s"] for row in settled)
    losses = [(row["loss_d"], row["loss_g"]) for row in rows]
    kept = sum(path.stat().st_size for path in found.folder.iterdir())
    figures = {
        "images_per_s": round(rate, 2),
        "images": found.images_seen,
        "loss_d": losses[-1][0],
        "loss_g": losses[-1][1],
        "checkpoint_bytes": kept,
    }
    if not all(isinstance(each, float) and math.isfinite(each) for pair in losses for each in pair):
        return [failed(name, "losses are not finite", "--precision fp32; on a GPU its memory may be faulty")], {}
    text = f"{rate:,.0f} images/s at 64 x 64 with the default settings, {found.images_seen:,} images, losses finite "
    text += f"(D {losses[-1][0]:.2f}, G {losses[-1][1]:.2f}), a checkpoint of {size(kept)} written and verified"
    return [ok(name, text)], figures


def _ending(how: Trained) -> str:
    if how.code < 0 and not how.last_words.startswith("it had not"):
        return f"killed by signal {-how.code}; {how.last_words}"
    return how.last_words or f"exit code {how.code}"


def train_alone(seconds: float, place: Place) -> tuple[list[Check], dict[str, Any]]:
    """One rank, without a process group."""
    with tempfile.TemporaryDirectory(prefix="dcgan-doctor-") as folder:
        _draw(Path(folder))
        return judged(Path(folder, "run"), {0: trained(Path(folder), seconds, place)})


def train_together(seconds: float, meeting: Meeting) -> tuple[list[Check], dict[str, Any]]:
    """All ranks, each with a trainer of its own at a meeting point of their own; every rank calls it.

    Returns:
        On rank 0 as judged(); nothing elsewhere.
    """
    place = meeting.place
    plan = meeting.decide("training", {"port": _free_port(), "folder": f"dcgan-doctor-{secrets.token_hex(6)}"})
    folder = Path(tempfile.gettempdir(), f"{plan['folder']}-{place.node}")
    problem = ""
    try:
        if place.leads_node:
            try:
                folder.mkdir(mode=0o700)
                _draw(folder)
            except (OSError, ConfigError) as error:
                problem = f"{socket.gethostname()}: {first_line(error)}"
        meeting.tell("drawn", problem)
        told = meeting.hear("drawn") if place.rank == 0 else {}
        problems = meeting.decide("drawn", [each for each in told.values() if each])
        if problems:
            return [failed("training", "; ".join(problems[:3]), "TMPDIR with a folder that can be written")], {}
        how = trained(folder, seconds, place, {"MASTER_PORT": str(plan["port"])})
        meeting.tell("trained", [how.code, how.last_words])
        result: tuple[list[Check], dict[str, Any]] = ([], {})
        if place.rank == 0:
            ended = {rank: Trained(*said) for rank, said in meeting.hear("trained", seconds + START_S).items()}
            silent = {rank: Trained(1, "no answer") for rank in meeting.present if rank not in ended}
            result = judged(folder / "run", ended | silent)
        meeting.decide("done")
        return result
    finally:
        if place.leads_node:
            shutil.rmtree(folder, ignore_errors=True)


def _draw(folder: Path) -> None:
    from pipeline.face_set import write_faces

    write_faces(folder / "faces", NUM_FACES, workers=1)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
