"""Faults on purpose, for tests: DCGAN_FAULT="kind:rank:step", several with commas between them.

Each fires once, before the step of that number, on that rank, and only in the first start under torchrun, so that a
restarted run gets through.  No setting leads here, only the environment variable.

    kill        SIGKILL to itself               stop        SIGSTOP to itself
    term        SIGTERM to itself               exception   RuntimeError
    hang        never comes back                nan         latents that are not numbers, for one step
    nan-from    the same from that step on      slow-from   a fifth of a second before every step from that one on
    slow-write  three seconds within the write of every checkpoint from that step on
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.config import ConfigError

VARIABLE = "DCGAN_FAULT"
SLOW_S = 0.2
SLOW_WRITE_S = 3.0

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_LASTING = ("nan-from", "slow-from", "slow-write")
KINDS = (*_SIGNALS, "exception", "hang", "nan", *_LASTING)


@dataclass(frozen=True)
class Fault:
    """One entry of the variable."""

    kind: str
    rank: int
    step: int


class Faults:
    """The faults that this rank shall have."""

    def __init__(self, faults: list[Fault]) -> None:
        self._waiting = faults

    @classmethod
    def from_environment(cls, rank: int) -> Faults:
        """
        Raises:
            ConfigError: the variable is not understood.
        """
        found = []
        for entry in filter(None, os.environ.get(VARIABLE, "").split(",")):
            kind, _, place = entry.partition(":")
            numbers = place.split(":")
            if kind not in KINDS or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
                raise ConfigError(f"{VARIABLE} must be kind:rank:step with a kind of {', '.join(KINDS)}, got {entry!r}")
            found.append(Fault(kind, int(numbers[0]), int(numbers[1])))
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        return cls([f for f in found if f.rank == rank and first_start])

    def due(self, step: int) -> set[str]:
        """The kinds that fire before this step; those that happen once are then gone."""
        fires = [f for f in self._waiting if (f.step <= step if f.kind in _LASTING else f.step == step)]
        self._waiting = [f for f in self._waiting if f not in fires or f.kind in _LASTING]
        return {f.kind for f in fires}

    def slow_write(self) -> float:
        """Seconds that the write of a checkpoint shall take longer."""
        return SLOW_WRITE_S if any(f.kind == "slow-write" for f in self._waiting) else 0.0

    def wrap(self, step: Any, batch_size: int) -> Any:
        """The step with its faults; the step itself where there are none."""
        return FaultyStep(step, self, batch_size) if self._waiting else step


class FaultyStep:
    """A step that suffers what is due before it does its work."""

    def __init__(self, step: Any, faults: Faults, batch_size: int) -> None:
        self.step, self.faults, self.batch_size = step, faults, batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, images: Tensor, latents: Tensor, images_seen: int, batch_size: int, *numbers: Tensor) -> Tensor:
        due = self.faults.due(images_seen // self.batch_size)
        for kind in due & _SIGNALS.keys():
            os.kill(os.getpid(), _SIGNALS[kind])
        if "exception" in due:
            raise RuntimeError(f"a fault on purpose at step {images_seen // self.batch_size}")
        if "hang" in due:
            threading.Event().wait()
        if "slow-from" in due:
            time.sleep(SLOW_S)
        if due & {"nan", "nan-from"}:
            latents = latents * float("nan")
        measured: Tensor = self.step(images, latents, images_seen, batch_size, *numbers)
        return measured
