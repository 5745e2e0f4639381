"""Where a step's time goes: shares of its phases in one line, and traces of single steps by torch.profiler.

Both only look: a run's results are the same to the bit with and without them.  Nothing here waits for the device inside
a step.  On a CPU a clock is read where a phase ends; on a GPU an event is put into the stream there, and the events are
read between two steps, once, when enough of them have passed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.config import ProfileConfig
from pipeline.step import Step

if TYPE_CHECKING:
    from pipeline.trainer import Run

PHASES = ("data", "forward", "backward", "communication", "optimiser", "rest")
"""What a step consists of: waiting for images and drawing latents; forward passes and losses; backward passes;
communication that these do not hide; updates, looking for numbers that are not finite, G's average; meters and
whatever lies between two steps."""
WARM_UP_STEPS = 10
MEASURED_STEPS = 100
"""Steps of a start after which the shares are told; the first WARM_UP_STEPS of them do not count."""
_ROWS = 30
_MEMORY_EVENTS = 200_000


class Phases:
    """The time between marks, by the name of the later one, over the first MEASURED_STEPS of a start.

    Call begin() before each step and done() after it; the step calls mark().
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps = 0
        self._marks: list[tuple[str, Any]] = []
        """The name of each phase and when it ended: seconds, or an event; "" where a step begins."""
        self._sent = False
        self._hooks: list[Any] = []

    @property
    def over(self) -> bool:
        """Whether nothing is measured any more."""
        return self.steps >= MEASURED_STEPS

    def watch(self, networks: Iterable[nn.Module]) -> None:
        """Tell communication apart: what follows in a backward pass once these networks' gradients are all there."""
        for network in networks:
            first = next(network.parameters())  # of the layer that backward comes to last
            self._hooks.append(first.register_post_accumulate_grad_hook(self._gradients_ready))

    def _gradients_ready(self, _parameter: Tensor) -> None:
        self.mark("backward")
        self._sent = True

    def begin(self) -> None:
        """A step begins here; what lay between it and the one before belongs to the rest."""
        self.mark("rest" if self._marks else "")

    def mark(self, phase: str) -> None:
        """A phase ends here, and another one begins."""
        if self.over or self.steps < WARM_UP_STEPS:
            return
        if phase == "backward" and self._sent:
            phase, self._sent = "communication", False
        if not self.on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def done(self) -> dict[str, float] | None:
        """A step is done.  After the last one that counts: each phase's share of the time, in percent; else None."""
        self.steps += 1
        if self.steps != MEASURED_STEPS:
            return None
        shares = self._shares()
        for hook in self._hooks:
            hook.remove()
        self._marks, self._hooks = [], []
        return shares

    def _shares(self) -> dict[str, float]:
        if self.on_gpu:
            self._marks[-1][1].synchronize()
        times = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:], strict=False):
            times[phase] += before.elapsed_time(now) / 1e3 if self.on_gpu else now - before
        whole = max(sum(times.values()), 1e-9)
        return {phase: 100 * seconds / whole for phase, seconds in times.items()}


def in_words(shares: dict[str, float]) -> str:
    """The line of a person."""
    parts = ", ".join(f"{phase} {share:.1f} %" for phase, share in shares.items())
    return f"where the time goes, steps {WARM_UP_STEPS + 1} to {MEASURED_STEPS}: {parts}"


class Trace:
    """Records profile.steps steps of a start into RUN/profile, which close() ends early.

    Args:
        name: of the files, without what follows the first dot; the start's images seen and the rank.
        told: called with a Markdown table of the operations that took longest, once the trace lies there.
        say: called with a line where it lies, or why it could not be written.
    """

    def __init__(
        self, cfg: ProfileConfig, folder: Path, name: str, told: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self.cfg, self.folder, self.name, self.told, self.say = cfg, folder, name, told, say
        self.steps = 0
        self._profile: profile | None = None

    def before_step(self) -> None:
        """Begins with the step before the first one, since the profiler's own start takes time."""
        if self.steps == self.cfg.from_step - 2:
            self._begin()

    @property
    def is_last(self) -> bool:
        """Whether the trace ends with the step under way."""
        return self.steps + 1 == self.cfg.from_step - 1 + self.cfg.steps

    def done(self) -> None:
        """A step is done."""
        last = self.is_last
        self.steps += 1
        if self._profile is not None and last:
            self._end()
        elif self._profile is not None:
            self._profile.step()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            if self.cfg.memory:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self.cfg.steps, repeat=1),
            profile_memory=self.cfg.memory,
        )
        self._profile.start()

    def _end(self) -> None:
        profiled, self._profile = self._profile, None
        assert profiled is not None
        profiled.stop()
        path = self.folder / f"{self.name}.pt.trace.json.gz"
        try:
            self._write(profiled, path)
        except (OSError, RuntimeError) as error:  # a full disk is either
            self.say(f"cannot write the profile {path}: {str(error).splitlines()[0]}")
        finally:
            if torch.cuda.is_available() and self.cfg.memory:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiled: profile, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(path))
        if torch.cuda.is_available() and self.cfg.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{self.name}.memory.pickle"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=by, row_limit=_ROWS)
        (self.folder / f"{self.name}.txt").write_text(table + "\n")
        self.told(table)
        self.say(f"profile of {self.steps - self.cfg.from_step + 1} steps: {path}")

    def close(self) -> None:
        """Stop; what was recorded of an unfinished trace is written too."""
        if self.steps < self.cfg.from_step:
            self.say(f"no profile: {self.steps} steps were made, and profile.from_step is {self.cfg.from_step}")
        if self._profile is not None and self.steps >= self.cfg.from_step:
            self._end()
        elif self._profile is not None:
            self._profile.stop()
            if torch.cuda.is_available() and self.cfg.memory:
                torch.cuda.memory._record_memory_history(enabled=None)


class Look:
    """What a start watches of its own steps: the phases on rank 0, and the trace where profile.steps asks for one.

    Args:
        mode: with graph a step runs as a whole, and its phases cannot be told apart.
        paused: entered while a trace is written, which is no training.
    """

    def __init__(
        self, run: Run, step: Step, mode: str, images_seen: int, paused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.run, self.paused, self.images_seen = run, paused, images_seen
        rank, cfg = run.ranks.rank, run.cfg.profile
        self.phases = Phases(step.device) if mode != "graph" and run.ranks.leads else None
        if self.phases:
            step.mark = self.phases.mark
            self.phases.watch([getattr(step.players, name) for name in step.players.parallel])
        wanted = cfg.steps > 0 and (run.ranks.leads or cfg.every_rank)
        name = f"images-{images_seen:09d}-rank-{rank}"
        self.trace = Trace(cfg, run.folder.path / "profile", name, self._table, self._say) if wanted else None

    def begin(self) -> None:
        """A step begins."""
        if self.phases:
            self.phases.begin()
        if self.trace:
            self.trace.before_step()

    def done(self) -> None:
        """A step is done; where the time goes is told, once, when it is known."""
        if self.trace:
            with self.paused() if self.trace.is_last else contextlib.nullcontext():
                self.trace.done()
        shares = self.phases.done() if self.phases else None
        if shares:
            self.run.say(in_words(shares))
            self.run.folder.update(time_percent={phase: round(share, 2) for phase, share in shares.items()})

    def _table(self, table: str) -> None:
        if self.run.log is not None:
            self.run.log.table("Profile", table, self.images_seen)

    def _say(self, text: str) -> None:
        if self.run.ranks.leads:
            self.run.say(text)
        else:
            print(f"rank {self.run.ranks.rank}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Write what was recorded of an unfinished trace."""
        if self.trace:
            self.trace.close()
