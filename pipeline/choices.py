"""Which of several implementations does each operation: measured once, remembered, printable, and yours to overrule.

An operation has a name ("batchnorm") and a key that says at what size ("128x64x32x32 bf16 cuda").  What decides, the
first that applies:

    1. kernels.choices, a JSON file
    2. the operation's own setting, such as kernels.batchnorm
    3. what this run has chosen at an earlier start on such a machine: RUN/choices.json; a resumed run times nothing
    4. what an earlier run on such a machine has measured: CACHE/choices/<machine>.json
    5. a measurement, now

Such a machine: equal in all that `machine_facts` names.  The ranks choose together: rank 0 decides among what every
rank has, and tells the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import ConfigError
from pipeline.environment import ROOT, cpu_name
from pipeline.errors import StorageError
from pipeline.files import written_aside

FORMAT = 1
RUN_FILE = "choices.json"
BLOCKS = 9
"""Candidates take turns so often; each one's median counts."""
LEAST_BLOCKS = 3
BLOCK_S = 0.02
"""A block repeats a candidate for about so long."""
BUDGET_S = 3.0
"""After so long a measurement ends with the blocks it has, LEAST_BLOCKS at least."""
LONG_S, CLEAR = 0.1, 1.5
"""A candidate that takes so long, and so many times the fastest one's time, need not be timed again."""
VERY_LONG_S, CLEAR_THEN = 1.0, 1.2
"""Of calls that take so long the noise is a smaller share, and timing them again keeps a run from its first step."""
MARGIN = 0.02
"""The first candidate, the plain one, stays unless another takes so much less."""

Candidates = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class Choice:
    """What one operation at one size uses."""

    choice: str
    why: str
    """Where that comes from, in words."""
    ms: dict[str, float] = field(default_factory=dict)
    """Each candidate's median, where it was measured."""

    def line(self, name: str) -> str:
        """For a person: the name, the choice, the figures, the reason."""
        return f"{name}: {self.choice} ({self.reason})"

    @property
    def reason(self) -> str:
        """The figures and where they come from."""
        told = ", ".join(f"{candidate} {ms:.3g} ms" for candidate, ms in self.ms.items())
        return f"{told}; {self.why}" if told else self.why


NO_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What a candidate says that finds too little memory: a GPU's, or the scratch space of a C kernel."""


class ChoicesError(ValueError):
    """A file that holds no choices."""


def machine_facts(device: torch.device, threads: int = 0) -> dict[str, Any]:
    """All that a measurement is good for: on a machine that differs in one of these it is made anew.

    Args:
        threads: of a rank; 0: what torch is set to.
    """
    sources = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            sources.update(path.name.encode() + path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": sources.hexdigest()[:12],
    }


def cache_file(folder: Path, machine: dict[str, Any]) -> Path:
    """Where the measurements of such a machine lie, named for people and for uniqueness."""
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device}-{machine['threads']}t-torch{machine['torch']}").strip("-")
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:8]
    return folder / "choices" / f"{name}-{digest}.json"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Choice]]:
    """The machine and the choices of a file; nothing where there is none.

    Raises:
        ChoicesError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, {}
    except ValueError as error:
        raise ChoicesError(f"{path} is no JSON ({error})") from None
    try:
        if found["format"] != FORMAT:
            raise ChoicesError(f"{path} has format {found['format']}, {FORMAT} is read here")
        choices = {}
        for name, entry in found["choices"].items():
            ms = {str(k): float(v) for k, v in entry.get("ms", {}).items()}
            if not isinstance(entry["choice"], str):
                raise TypeError
            choices[name] = Choice(entry["choice"], str(entry.get("why", "")), ms)
        return dict(found.get("machine", {})), choices
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ChoicesError):
            raise
        raise ChoicesError(f"{path} holds no choices") from None


def write(path: Path, machine: dict[str, Any], choices: Mapping[str, Choice]) -> None:
    """
    Raises:
        StorageError: the disk refused.
    """
    entries = {name: asdict(choices[name]) for name in sorted(choices)}
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"format": FORMAT, "machine": machine, "choices": entries}, indent=1) + "\n")


class Choices:
    """The choices of one run on this machine.

    Every rank makes one and calls `pick` for the same operations in the same order.

    Args:
        device: what the candidates run on.
        cache: folder where measurements are kept for other runs; None: nowhere.
        run: the run folder; None: none.
        overrides: a file that stands above everything; empty: none.
        say: told, on rank 0, a line about each measurement and each file that could not be used.
        clock: seconds, for tests.

    Raises:
        ConfigError: the overrides cannot be read; the same on every rank.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        cache: Path | None = None,
        run: Path | None = None,
        overrides: str = "",
        leads: bool = True,
        say: Callable[[str], None] = lambda _line: None,
        clock: Callable[[], float] = time.perf_counter,
        machine: dict[str, Any] | None = None,
    ) -> None:
        self.device = device
        self.machine = machine or machine_facts(device)
        self._cache = cache_file(cache, self.machine) if cache else None
        self._run = run / RUN_FILE if run else None
        self._leads, self._say, self._clock = leads, say, clock
        self._overrides_path = overrides
        self._overrides: dict[str, Choice] = self._on_leader(self._read_overrides)
        self._of_run: dict[str, Choice] = self._on_leader(self._read_run)
        self._kept = self._of_run
        self.made: dict[str, Choice] = {}
        """What this run uses, by `operation key`, in the order of picking."""

    def _on_leader(self, action: Callable[[], Any]) -> Any:
        return distributed.broadcast(distributed.together(lambda: action() if self._leads else None))

    def _read_overrides(self) -> dict[str, Choice]:
        if not self._overrides_path:
            return {}
        path = Path(self._overrides_path)
        if not path.exists():
            raise ConfigError(f"kernels.choices must be a file, got {path}, which is not there")
        try:
            return read(path)[1]
        except ChoicesError as error:
            raise ConfigError(f"kernels.choices: {error}") from None
        except OSError as error:
            raise ConfigError(f"kernels.choices: {path} cannot be read ({error.strerror})") from None

    def _read_run(self) -> dict[str, Choice]:
        machine, choices = self._usable(self._run)
        # Kernels whose code has changed since are no reason to choose anew: the run goes on with what it began with.
        changed = [
            f"{key} {machine.get(key)} -> {now}"
            for key, now in self.machine.items()
            if machine.get(key) != now and key != "kernels"
        ]
        if choices and changed:
            self._say(f"{self._run} was made elsewhere ({', '.join(changed)}): what it chose is not used")
            return {}
        return choices

    def _usable(self, path: Path | None) -> tuple[dict[str, Any], dict[str, Choice]]:
        """A file's content, or nothing and a line that says why not."""
        try:
            return read(path) if path else ({}, {})
        except ChoicesError as error:
            self._say(f"{error}: measured anew")
        except OSError as error:
            self._say(f"{path} cannot be read ({error.strerror}): measured anew")
        return {}, {}

    def pick(self, operation: str, key: str, candidates: Candidates, override: str = "auto") -> str:
        """The candidate to use for an operation at a size; every rank gets the same.

        Args:
            operation: its name, that of its setting under `kernels` where it has one.
            key: what the answer depends on: shapes, dtype, memory format.
            candidates: name and a call that does the operation once at that size; the plain one first, which wins
                where none is faster.  Called on rank 0 only, and only where nobody knows the answer.
            override: the operation's setting; auto: whatever is fastest.

        Raises:
            ConfigError: the override, or kernels.choices, names what there is not; the same on every rank.
        """
        assert candidates
        name = f"{operation} {key}"
        everywhere = set.intersection(*map(set, distributed.gather(list(candidates))))
        names = [candidate for candidate in candidates if candidate in everywhere]
        choice: Choice = distributed.together(lambda: self._told(name, operation, names, override)) or self._on_leader(
            lambda: self._known(name, names) or self._measured(name, {c: candidates[c] for c in names})
        )
        self.made[name] = choice
        self._on_leader(self._keep)
        return choice.choice

    def recall(self, operation: str, key: str, names: list[str], otherwise: str) -> str:
        """As pick, but nothing is measured: what nobody knows is the first of the names, and stays so in this run.

        Args:
            otherwise: the reason for the first one, in words.
        """
        name = f"{operation} {key}"
        told = distributed.together(lambda: self._told(name, operation, names, "auto"))
        known: Choice | None = told or self._on_leader(lambda: self._known(name, names))
        self.made[name] = known or Choice(names[0], otherwise)
        self._on_leader(self._keep)
        return self.made[name].choice

    def why(self, operation: str, key: str) -> str:
        """Where the choice comes from, with its figures, as a sentence; empty: none is made."""
        choice = self.made.get(f"{operation} {key}")
        return f"{choice.reason}." if choice else ""

    def _told(self, name: str, operation: str, names: list[str], setting: str) -> Choice | None:
        """What the user wants."""
        source = "kernels.choices" if name in self._overrides else f"kernels.{operation}"
        wanted = self._overrides[name].choice if name in self._overrides else setting
        if wanted == "auto":
            return None
        if wanted not in names:
            raise ConfigError(f"{source} must be of {', '.join(names)} for {name} here, got {wanted!r}")
        return Choice(wanted, f"by {source}")

    def _known(self, name: str, names: list[str]) -> Choice | None:
        of_run = self._of_run.get(name)
        if of_run and of_run.choice in names:
            return of_run
        kept = self._usable(self._cache)[1].get(name)
        # With a candidate that it does not know, an older measurement says nothing.
        return kept if kept and kept.choice in names and set(names) <= kept.ms.keys() else None

    def _measured(self, name: str, candidates: Candidates) -> Choice:
        if len(candidates) == 1:
            return Choice(next(iter(candidates)), "there is nothing else here")
        ms = measure(candidates, self.device, self._clock)
        too_large = [candidate for candidate in candidates if candidate not in ms]  # a later run tries them again
        why = "".join(f"; no memory for {candidate} beside the others" for candidate in too_large)
        choice = Choice(fastest(ms or dict.fromkeys(candidates, 0.0)), f"measured {time.strftime('%Y-%m-%d')}{why}", ms)
        self._say(choice.line(name))
        if self._cache:
            try:
                write(self._cache, self.machine, self._usable(self._cache)[1] | {name: choice})
            except StorageError as error:
                self._say(f"what was measured is kept for this run only: {error}")
        return choice

    def _keep(self) -> None:
        # Those that this start did not ask for stay.  One that it was told to make anew is from now on the run's own.
        whole = self._of_run | self.made
        if self._run and whole != self._kept:  # a run that goes on writes nothing, whatever room the disk has
            write(self._run, self.machine, whole)
            self._kept = whole

    def layout(self) -> dict[str, str]:
        """For resume.layout: what each operation uses; the step's mode stands there by itself."""
        return {f"kernels.{name}": c.choice for name, c in self.made.items() if not name.startswith("mode ")}

    def lines(self) -> list[str]:
        """For people: what this run uses, or, where nothing is picked yet, what is known for such a machine."""
        known = self.made or self._usable(self._cache)[1] | self._of_run | self._overrides
        return [choice.line(name) for name, choice in known.items()]


def measure(
    candidates: Candidates, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Each candidate's median milliseconds, in blocks that take turns, so that a disturbance meets all of them.

    Each runs once beforehand, untimed: what it compiles or allocates then counts for nothing.  One that finds too
    little of the device's memory beside the others is left out.
    """

    def timed(call: Callable[[], None], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - start) / repeats

    once = {}
    for name, call in candidates.items():
        with contextlib.suppress(*NO_MEMORY):
            timed(call, 1)
            once[name] = max(timed(call, 1), 1e-6)
    least = min(once.values(), default=0.0)
    clear = max(LONG_S, (CLEAR if least < VERY_LONG_S else CLEAR_THEN) * least)
    repeats = {name: max(1, min(1000, math.ceil(BLOCK_S / s))) for name, s in once.items() if s < clear}
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    begun = clock()
    for block in range(BLOCKS if len(repeats) > 1 else 0):
        if block >= LEAST_BLOCKS and clock() - begun > BUDGET_S:
            break
        for name in list(seconds):
            try:
                seconds[name].append(timed(candidates[name], repeats[name]))
            except NO_MEMORY:
                del seconds[name], once[name]
    return {name: 1e3 * statistics.median(seconds.get(name) or [s]) for name, s in once.items()}


def fastest(ms: Mapping[str, float]) -> str:
    """The fastest one, or the first where none is faster by more than MARGIN."""
    plain, best = next(iter(ms)), min(ms, key=lambda name: ms[name])
    return best if ms[best] < (1 - MARGIN) * ms[plain] else plain
