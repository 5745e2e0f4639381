"""Checkpoints off the training thread: a copy of what changes, then one write at a time in the background.

Only the copy holds training up.  It goes into memory that was taken and touched beforehand: into fresh memory it takes
ten times as long (100 ms instead of 8 at the reference size of 90 MB, 2 cores, 2026-11).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import BEST, State, best, count_of, folders, remove, snapshot, write
from pipeline.errors import StorageError
from pipeline.files import written_aside
from pipeline.players import Players

_ALIGN = 16
_SPARE_BYTES = 1 << 20
"""Stays free beside a checkpoint, with a tenth of it, for logs and pictures."""


class Snapshots:
    """Snapshots of two networks and their optimisers into one piece of memory, used again each time."""

    def __init__(self, players: Players) -> None:
        self.players = players
        parameters = [p for n in (players.generator, players.discriminator) for p in n.parameters()]
        buffers = [b for n in (players.generator, players.discriminator) for b in n.buffers()]
        # Every parameter with two moments and a step count.
        tensors = [t for p in parameters for t in (p, p, p, p.new_zeros(()))] + buffers + list(players.ema.values())
        self._memory = torch.zeros(sum(self._room(t) for t in tensors))
        if next(iter(parameters)).is_cuda:
            self._memory = self._memory.pin_memory()
        self._used = 0

    @staticmethod
    def _room(tensor: Tensor) -> int:
        return -(-tensor.numel() // _ALIGN) * _ALIGN  # 64 bytes: where vector instructions like to begin

    def _take(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:  # a counter; torch.save keeps memory of two types apart
            return tensor.to("cpu", copy=True)
        place = torch.as_strided(self._memory, tensor.size(), tensor.stride(), self._used)
        self._used += self._room(tensor)
        return place.copy_(tensor, non_blocking=True)

    def take(self, rank_buffers: list[Tensor]) -> State:
        """As pipeline.checkpoint.snapshot; the one before it must be written, since this one takes its place."""
        self._used = 0
        state = snapshot(self.players, rank_buffers, self._take)
        if self._memory.is_pinned():
            torch.cuda.synchronize()
        return state


class Writer:
    """Writes checkpoints in the background, one at a time, and removes the old ones.

    Args:
        keep: the newest so many stay, beside the best and, of each milestone, the first that reached it.
        pause: called within each write; for tests.
    """

    def __init__(
        self, run: Path, keep: int, milestone_images: list[int], pause: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.keep, self.milestone_images, self.pause = run, keep, sorted(milestone_images), pause
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self.last: Path | None = None
        """The newest that is written."""

    def save(self, state: State, config_yaml: str, manifest: dict[str, Any]) -> None:
        """Begin writing; waits for the write before it.

        Raises:
            StorageError: the write before this one failed, or the disk has no room for this one.
        """
        self.wait()
        check_space(self.run, state)
        self._pending = self._pool.submit(self._write, state, config_yaml, manifest)

    def _write(self, state: State, config_yaml: str, manifest: dict[str, Any]) -> Path:
        folder = write(self.run, state, config_yaml, manifest, self.pause)
        self.last = folder
        self._prune()
        return folder

    def _prune(self) -> None:
        found = folders(self.run)
        counts = [count_of(p) for p in found]
        stays = set(counts[-self.keep :]) | {count_of(p) for p in found if p.name == best(self.run)}
        for milestone in self.milestone_images:
            stays |= set([c for c in counts if c >= milestone][:1])
        for folder, count in zip(found, counts, strict=True):
            if count not in stays:
                try:
                    remove(folder)
                except OSError as error:
                    raise StorageError(f"cannot remove the old checkpoint {folder}: {error.strerror}") from None

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            StorageError: the write failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the write in flight and end the thread."""
        self._pool.shutdown(wait=True)


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a state; those that share memory count it once."""
    storages: dict[int, int] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(inner)

    collect(state)
    return sum(storages.values())


def check_space(run: Path, state: State) -> None:
    """
    Raises:
        StorageError: the disk has too little room for a checkpoint of this state.
    """
    needed, free = int(1.1 * state_bytes(state)) + _SPARE_BYTES, shutil.disk_usage(run).free
    if free < needed:
        raise StorageError(
            f"cannot write a checkpoint into {run}: it takes {needed / 2**20:.0f} MiB with some room to spare, "
            f"{free / 2**20:.1f} are free"
        )


def mark_best(run: Path, folder: Path) -> None:
    """Have pruning spare this checkpoint until another one is marked.

    Raises:
        StorageError: the disk refused.
    """
    with written_aside(run / "checkpoints" / BEST) as aside:
        aside.write_text(json.dumps({"checkpoint": folder.name}) + "\n")


def forget_best(run: Path) -> None:
    """Mark none as the best.

    Raises:
        StorageError: the disk refused.
    """
    path = run / "checkpoints" / BEST
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None
