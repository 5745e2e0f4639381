"""Watchdogs: what goes wrong in training without an error, noticed.

Each looks at what is there anyway, the vote, a log row, the time of the last step, and says what it found.  Those that
change the course of training decide from numbers that are the same on all ranks, so that all of them decide alike.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import WatchConfig

TICK_S = 5.0
"""How often the hang watch looks, or four times within hang_s where that is shorter."""

_SLOW_SHARE = 0.1
"""A rank is slow only where it loses this share of a step: a ratio alone would name the ranks of an idle network."""


class Diverging(Exception):
    """Training goes wrong in a way that going back may mend.  Raised at the same step on every rank.

    Args:
        began: images seen when it began, where checkpoints were made since; None: none were.
    """

    def __init__(self, reason: str, images_seen: int, began: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.images_seen = images_seen
        self.began = images_seen if began is None else began


class SkipWatch:
    """Counts steps in a row whose update was left out because it was not finite."""

    def __init__(self, max_skipped_steps: int) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.streak = 0
        self.total = 0

    def look(self, hopeless: bool, images_seen: int) -> None:
        """
        Raises:
            Diverging: the row is as long as is borne.
        """
        self.streak = self.streak + 1 if hopeless else 0
        self.total += hopeless
        if self.streak >= self.max_skipped_steps:
            raise Diverging(f"{self.streak} steps in a row were not finite", images_seen)


class CollapseWatch:
    """Sees when D has won for good, or G draws one picture only.  Reads the means of a log row.

    Args:
        least_d: the least that D can pay with the run's loss (Losses.least_d), above which watch.min_loss_d counts;
            minus infinity for a critic, whose loss tells nothing of who has won.
    """

    def __init__(self, cfg: WatchConfig, least_d: float = 0.0) -> None:
        self.cfg = cfg
        self.least_d = least_d
        self._images = {"won": 0, "one": 0}
        """Images that each sign has held for without a break."""
        self._told: set[str] = set()

    @property
    def held(self) -> int:
        """Images that a sign has held for, told or not; the longer of the two."""
        return max(self._images.values())

    def look(self, row: dict[str, Any], images: int) -> str:
        """What has collapsed, told once until it has passed; empty: nothing new.

        Args:
            row: with loss_d and diversity, NaN where no step of the row was finite.
            images: since the row before.
        """
        signs = {
            "won": ("loss_d", self.least_d + self.cfg.min_loss_d, "D has won: its loss is"),
            "one": ("diversity", self.cfg.min_diversity, "G draws one picture: the diversity of its images is"),
        }
        news = []
        for sign, (key, limit, words) in signs.items():
            if not row[key] < limit:  # NaN is no sign of either
                self._images[sign] = 0
                self._told.discard(sign)
                continue
            self._images[sign] += images
            if self.cfg.collapse_images and self._images[sign] >= self.cfg.collapse_images and sign not in self._told:
                self._told.add(sign)
                news.append(f"{words} {row[key]:.3g}, below {limit:g} for {self._images[sign]} images")
        return "; ".join(news)


class OwnTime:
    """How long this rank works in a step before it must wait for the others: data, forward pass, its own delays.

    Between the ranks' last meeting and D's backward pass, whose gradients are the next one.  On a GPU by events in the
    stream, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._seconds = 0.0
        self._steps = 0
        self._pairs: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """The ranks have met; the next step begins."""
        self._begun = self._now()

    def end(self) -> None:
        """This rank is about to wait for the others."""
        if self._begun is None:
            return
        if self.on_gpu:
            self._pairs.append((self._begun, self._now()))
        else:
            self._seconds += time.perf_counter() - self._begun
        self._steps += 1
        self._begun = None

    def read(self) -> float:
        """Mean milliseconds a step since the last read; 0 where there was none.  Waits for the device."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1e3
        mean = 1e3 * self._seconds / max(1, self._steps)
        self._seconds, self._steps, self._pairs = 0.0, 0, []
        return mean


def slow_ranks(own_ms: Sequence[float], step_ms: float, ratio: float) -> list[int]:
    """The ranks whose own part of a step takes `ratio` times the median, and a tenth of the step longer."""
    if ratio == 0 or len(own_ms) < 2:
        return []
    # The lower median: of two ranks, the quicker one is the measure.
    middle = statistics.median_low(own_ms)
    return [r for r, ms in enumerate(own_ms) if ms > ratio * middle and ms - middle > _SLOW_SHARE * step_ms]


class SlowWatch:
    """Names ranks that hold the others up, once two rows running show the same ones: one may be a neighbour's doing.

    Args:
        hosts: of every rank.
    """

    def __init__(self, hosts: Sequence[str], ratio: float) -> None:
        self.hosts, self.ratio = hosts, ratio
        self._slow: list[int] = []
        self._told: list[int] = []

    def look(self, own_ms: Sequence[float], step_ms: float) -> str:
        """Which ranks are slow, told once; empty: nothing new.

        Args:
            own_ms: each rank's own part of a step.
        """
        before, self._slow = self._slow, slow_ranks(own_ms, step_ms, self.ratio)
        if not self._slow or self._slow != before or self._slow == self._told:
            return ""
        self._told = self._slow
        named = ", ".join(f"rank {r} on {self.hosts[r]} ({own_ms[r]:.0f} ms)" for r in self._slow)
        others = sorted(ms for r, ms in enumerate(own_ms) if r not in self._slow)
        return (
            f"slow: {named} before each backward pass, where the other ranks wait; they take "
            f"{others[len(others) // 2]:.0f} ms"
        )


class HangWatch:
    """Ends a process that has made no step for hang_s seconds, after writing down where each thread stands.

    Armed by the first beat().  Should even this thread not get to run, because some library keeps Python's lock, the
    system's timer in faulthandler does the same after twice the time.

    Args:
        folder: where hang-rank-N.txt goes.
        on_hang: called with the reason before the process ends with 1.
    """

    def __init__(self, hang_s: float, folder: Path, rank: int, on_hang: Callable[[str], None]) -> None:
        self.hang_s, self.folder, self.rank, self.on_hang = hang_s, folder, rank, on_hang
        self._last = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, patience_s: float = 0.0) -> None:
        """A step was made; the next beat may take so much longer than usual to come."""
        self._last = time.monotonic() + patience_s
        if self._thread is None and self.hang_s:
            self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        tick, looked = min(TICK_S, self.hang_s / 4), time.monotonic()
        while not self._closed.wait(tick):
            faulthandler.dump_traceback_later(2 * self.hang_s, exit=True)
            before, looked = looked, time.monotonic()
            if looked - before > self.hang_s / 2:  # the whole process stood still, stopped by a scheduler perhaps
                self._last = max(self._last, looked)
            if time.monotonic() - self._last > self.hang_s:
                self._end(f"no step for {self.hang_s:g} seconds on rank {self.rank} ({socket.gethostname()})")

    def _end(self, reason: str) -> None:
        try:
            path = self.folder / f"hang-rank-{self.rank}.txt"
            with path.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            print(f"{reason}; where each thread stands: {path}", file=sys.stderr, flush=True)
            self._write_nccl_trace()
            self.on_hang(reason)
        finally:
            os._exit(1)

    def _write_nccl_trace(self) -> None:
        """NCCL's flight recorder, where it is on (TORCH_FR_BUFFER_SIZE, in older versions of torch
        TORCH_NCCL_TRACE_BUFFER_SIZE)."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and dist.is_initialized() and dist.get_backend() == "nccl":
            (self.folder / f"nccl-trace-rank-{self.rank}.pickle").write_bytes(dump())

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
