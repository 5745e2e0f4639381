"""The trainer as a user starts it, and what tests do to it: tiny settings, signals, waiting, comparing what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import checkpoint as checkpoints
from pipeline.face_set import write_faces

ROOT = Path(__file__).resolve().parent.parent
BATCH, IMAGES, MAX_IMAGES = 8, 40, 400
SETTINGS = {
    "data": {"image_size": 16, "crop_margin": 2, "flip": True, "brightness": 0.1},
    "model": {"nz": 8, "ngf": 4, "ndf": 4},
    "train": {"batch_size": BATCH, "num_epochs": 1_000_000, "max_images": MAX_IMAGES},
    "checkpoint": {"every_images": 40},
    "log": {"every_steps": 2, "grid_every_images": 80, "grid_size": 4},
    "distributed": {"threads": 1},
}
ENDLESS = ("--train.max_images", "80000000", "--log.grid_every_images", "0")
"""Options of a run that is still going when a test has seen what it waits for."""
PATIENCE_S = 200
"""How long a state may take to come on a busy machine."""


def make_workspace(folder: Path) -> Path:
    """The folder with a few faces and the settings above in tiny.yaml."""
    write_faces(folder / "faces", IMAGES, seed=1, workers=1)
    settings = SETTINGS | {"data": SETTINGS["data"] | {"cache_dir": str(folder / "cache")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def trainer_words(workspace: Path, run: str, *options: str) -> list[str]:
    """The trainer's script and its options."""
    paths = ["--config", str(workspace / "tiny.yaml"), "--data.dataroot", str(workspace / "faces")]
    return [str(ROOT / "launch/train.py"), *paths, "--run.dir", str(workspace / run), *options]


def command(workspace: Path, run: str, ranks: int, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """python launch/train.py on one rank, torchrun on several; the launcher's own options before the script."""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    return [*words, *trainer_words(workspace, run, *options)]


def wrapped(workspace: Path, run: str, ranks: int, *options: str) -> list[str]:
    """The same through launch/run.py."""
    words = [sys.executable, str(ROOT / "launch/run.py"), "--standalone", f"--nproc_per_node={ranks}"]
    return [*words, *trainer_words(workspace, run, *options)]


def train(workspace: Path, run: str, ranks: int = 1, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(workspace, run, ranks, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def started(words: list[str], log: Path, **environment: str):
    """The command in the background, its output in `log`; whatever is left of it is killed at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def wait_for(holds: Callable[[], Any], what: str, process: subprocess.Popen | None = None) -> None:
    """Poll until it holds.  Fails when it takes too long, or when the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        assert process is None or process.poll() is None or holds(), f"ended before: {what}"
        time.sleep(0.01)


def wait_for_images(run: Path, images: int, process: subprocess.Popen) -> None:
    """Until so many images are in stats.jsonl."""
    stats = run / "stats.jsonl"
    wait_for(
        lambda: stats.exists() and any(row["images_seen"] >= images for row in rows(stats)),
        f"{images} images in {stats}",
        process,
    )


def train_and_kill(workspace: Path, run: str, ranks: int, images: int) -> None:
    """Start the command and SIGKILL all of its processes once `images` images are in stats.jsonl."""
    with started(command(workspace, run, ranks), workspace / f"{run}.log") as process:
        wait_for_images(workspace / run, images, process)
        assert process.poll() is None, "it ended before it could be killed"


def children_of(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    return [each for child in children_of(pid) for each in (child, *descendants(child))]


def workers_of(pid: int) -> list[int]:
    """The ranks below a launcher: the processes that run the trainer's script, in the order of their start."""
    found = []
    for child in sorted(descendants(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if (
                words[-1:] == [b""]
                and b"torch.distributed.run" not in words
                and any(w.endswith(b"launch/train.py") for w in words)
            ):
                found.append(child)
    return found


def kill_tree(pid: int) -> None:
    """torchrun gives each worker a session of its own: find them by parenthood."""
    children = children_of(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        if Path(f"/proc/{child}").exists():
            kill_tree(child)


def left_of(run: Path) -> list[str]:
    """Command lines of processes that still work for a run folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if str(run).encode() in words:
                    found.append(b" ".join(words).decode(errors="replace"))
    return found


def checkpoints_of(run: Path) -> list[int]:
    """Images of all checkpoints, each of which must match its manifest."""
    return [checkpoints.verify(folder).images_seen for folder in checkpoints.folders(run)]


def partials(run: Path) -> list[Path]:
    """Checkpoints half written or half removed."""
    return list((run / "checkpoints").glob(".images-*"))


def free_port() -> int:
    """A port that nobody holds at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def state_of(run: Path, images: int = MAX_IMAGES) -> dict:
    return torch.load(run / f"checkpoints/images-{images:09d}/state.pt", weights_only=True)


def flat(value, prefix="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix: value}


def assert_bit_equal(one: dict, other: dict) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert equal, key
