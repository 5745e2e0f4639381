"""Settings of a look at single steps: part of pipeline/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config_error import require


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    steps: int = 0
    """Steps that torch.profiler records into run.dir/profile; 0: none. At least 0, at most 1000."""
    from_step: int = 20
    """The first of them, counted from this start; those before it warm up. At least 2."""
    memory: bool = True
    """Record what takes memory as well; on a GPU also a snapshot of its memory and how it came to be."""
    every_rank: bool = False
    """A trace of each rank; else of rank 0 only."""

    def __post_init__(self) -> None:
        require(0 <= self.steps <= 1000, "profile.steps", "between 0 and 1000", self.steps)
        require(self.from_step >= 2, "profile.from_step", "at least 2", self.from_step)
