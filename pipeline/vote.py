"""What the ranks tell each other at every step, in one small all-reduce that is read a step later.

Whoever has been told to stop, has skipped an update or has met a bad file puts that into a vector; the sum is the same
on every rank, so all of them stop, roll back or complain after the same step.  The host looks at the vote of the step
before while the next one is under way: on a GPU it never waits for the step it has just begun.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "train.max_minutes")
"""Why a rank may want to stop."""
_SIZE = len(REASONS) + 2


def reason_of(number: int) -> str:
    """The name of a signal."""
    return signal.Signals(number).name


@dataclass(frozen=True)
class Tally:
    """The sum over all ranks for one step."""

    images_seen: int
    """After that step."""
    stop: str
    """Why to stop; empty: nobody wants to."""
    num_wanting: int
    """Ranks that want to stop."""
    hopeless: bool
    """An update was left out because its gradients were not finite."""
    bad_samples: int
    """Bad files met so far by all ranks."""


class Vote:
    """The votes of one rank.  Every rank casts and reads in turn: cast() after each step, then tally()."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.world_size = world_size
        self.on_gpu = device.type == "cuda"
        # float64 counts exactly; two of everything: one may still be travelling while the other is filled.
        self._mine = [torch.zeros(_SIZE, dtype=torch.float64, pin_memory=self.on_gpu) for _ in range(2)]
        self._sums = [torch.zeros(_SIZE, dtype=torch.float64, device=device) for _ in range(2)]
        self._read = [torch.zeros(_SIZE, dtype=torch.float64, pin_memory=self.on_gpu) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []
        self._pending: tuple[int, int, Any] | None = None
        self._turn = 0

    def cast(self, images_seen: int, stop: str, hopeless: Tensor, bad_samples: int) -> None:
        """Send this rank's vote on its way; the one before must have been read.

        Args:
            stop: one of REASONS, or empty.
            hopeless: () on the device, above 0 where an update was left out.
        """
        assert self._pending is None
        turn = self._turn = 1 - self._turn
        mine, sums = self._mine[turn], self._sums[turn]
        mine.zero_()
        if stop:
            mine[REASONS.index(stop)] = 1
        mine[-1] = bad_samples
        sums.copy_(mine, non_blocking=True)
        sums[-2].copy_(hopeless, non_blocking=True)
        work = None
        if self.world_size > 1:
            # gloo: in its own thread.  NCCL: in the stream, after the step.
            work = dist.all_reduce(sums, async_op=not self.on_gpu)
        if self.on_gpu:
            self._read[turn].copy_(sums, non_blocking=True)
            self._events[turn].record()
        self._pending = images_seen, turn, work

    def tally(self) -> Tally | None:
        """The sum of the vote under way, once it is there; None: none is.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self._pending is None:
            return None
        images_seen, turn, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        if self.on_gpu:
            self._events[turn].synchronize()
        *stops, hopeless, bad = (self._read if self.on_gpu else self._sums)[turn].tolist()
        stop = next((reason for reason, ranks in zip(REASONS, stops, strict=True) if ranks), "")
        return Tally(images_seen, stop, round(sum(stops)), hopeless > 0, round(bad))
