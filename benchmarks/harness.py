"""What every benchmark shares: alternating blocks, medians with their intervals, result lines, the table.

Machines drift: the same code has read 209 and 132 images/s an hour apart.  So nothing is compared across runs.  What is
compared runs in turns, block by block in one process, each pair of neighbouring blocks gives one ratio, and the median
of the ratios is reported with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import environment
from pipeline.cli import command
from pipeline.config import ConfigError, DataConfig
from pipeline.errors import StorageError
from pipeline.face_set import write_faces
from pipeline.index import cache_folder

RESULTS = Path(__file__).resolve().parent / "results"
RESAMPLES = 10_000
NUM_FACES = 2_000
"""Cartoon faces that a benchmark draws for itself where it is given no photographs."""


@dataclass(frozen=True)
class Estimate:
    """A median and where it lies with 95 % confidence."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median with its percentile bootstrap interval (Efron 1979), the same for the same values.

    Args:
        values: at least one; of a single one the interval is that value.
    """
    found = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(np.median(found[drawn], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(found)), float(low), float(high))


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round, how often as much the first is as the second."""
    return [a / b for a, b in zip(of, to, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """What lies a quarter from the lowest and a quarter from the highest: how far single blocks spread."""
    return np.percentile(np.asarray(values, np.float64), [25, 75]).tolist()


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): each name once a round, in reverse every other round, so that none always follows the same one."""
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            yield i, name


def paired(
    arms: Mapping[str, Callable[[int], float]],
    *,
    pairs: int,
    steps: int,
    say: Callable[[str], None] = lambda _text: None,
) -> dict[str, list[float]]:
    """Run blocks of the arms in turns.

    Args:
        arms: what to compare, by name: runs so many steps and returns the seconds they took.  Those whose ratio is
            wanted best stand beside each other.
        pairs: blocks of each arm.
        steps: steps of a block.
        say: told the time of each block.

    Returns:
        Seconds of each arm's blocks, in the order of the rounds: equal places belong together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i, name in turns(list(arms), pairs):
        seconds[name].append(arms[name](steps))
        say(f"round {i + 1}/{pairs}  {name:<16} {1000 * seconds[name][-1] / steps:8.1f} ms a step")
    return seconds


def say(text: str) -> None:
    """Progress for a person, beside the table that goes to stdout."""
    print(text, file=sys.stderr, flush=True)


class Recorder:
    """Result lines of one run of a benchmark, each with what it ran on.

    Args:
        benchmark: its name, after which the file is called.
        argv: its command line without the program.
        folder: where the lines are appended; None: nowhere.
    """

    def __init__(self, benchmark: str, argv: Sequence[str], folder: Path | None) -> None:
        self.benchmark = benchmark
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._facts = environment.describe() | {
            "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def add(
        self, variant: str, images_per_s: Sequence[float], ratio_to_tutorial: Sequence[float] | None, **facts: Any
    ) -> dict[str, Any]:
        """One result line.

        Args:
            images_per_s: of each block.
            ratio_to_tutorial: of each round; None: the tutorial's loop did not run beside it.
            facts: further plain values.

        Raises:
            StorageError: it cannot be written.
        """
        ratio = None if ratio_to_tutorial is None else estimate(ratio_to_tutorial)
        row: dict[str, Any] = {
            "variant": variant,
            "images_per_s": float(np.median(images_per_s)),
            "images_per_s_quartiles": quartiles(images_per_s),
            "ratio_to_tutorial": ratio and ratio.median,
            "ratio_interval": ratio and [ratio.low, ratio.high],
        }
        return self.note(**row, **facts)

    def note(self, **facts: Any) -> dict[str, Any]:
        """A result line of these plain values and what the run ran on.

        Raises:
            StorageError: it cannot be written.
        """
        row: dict[str, Any] = _rounded({"benchmark": self.benchmark} | facts | self._facts)
        self.rows.append(row)
        if self.folder is not None:
            path = self.folder / f"{self.benchmark}.jsonl"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
            except OSError as error:
                raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
        return row


def _rounded(value: Any) -> Any:
    """Numbers to five digits, wherever they stand: more would claim a precision that no timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns under their names: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join([first, *rest])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, lines)])


def shown(value: float | None, digits: int = 1) -> str:
    """A number for the table; "-" where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def shown_ratio(row: dict[str, Any], key: str, interval_key: str) -> str:
    """A ratio and its interval for the table."""
    if row.get(key) is None:
        return "-"
    low, high = row[interval_key]
    return str(Estimate(row[key], low, high))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that takes photographs."""
    parser.add_argument("--data", default="", help=f"photographs; without it {NUM_FACES} cartoon faces are drawn")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if any")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result lines")
    parser.add_argument("--no-record", action="store_true", help="print only; append no result lines")


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """An argparse type: words between commas, at least one."""
    found = [word for word in text.split(",") if word]
    if not found:
        raise argparse.ArgumentTypeError(f"must be names between commas, got {text!r}")
    return found


def numbers(text: str) -> list[int]:
    """An argparse type: integers of at least 1 between commas."""
    return [command.at_least(1)(word) for word in names(text)]


def choose_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        ConfigError: it is cuda, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device must be auto or cpu where torch finds no GPU, got 'cuda'")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def photographs(data: str, cfg: DataConfig) -> str:
    """The path to read: as given, else cartoon faces, drawn once into the cache folder."""
    if data:
        return data
    folder = cache_folder(cfg) / f"benchmark-faces-{NUM_FACES}"
    if not folder.exists():
        say(f"drawing {NUM_FACES} cartoon faces into {folder}")
    write_faces(folder, NUM_FACES)
    return str(folder)


def refuse_other_shapes(cfg: DataConfig, channels: int) -> None:
    """
    Raises:
        ConfigError: the images are not of a shape that the tutorial's networks take.
    """
    height, width = cfg.size
    if height != width or height & (height - 1) or cfg.nc != channels:
        raise ConfigError(
            f"data.image_size and data.nc must be a power of two and {channels}, which is what the tutorial's networks "
            f"take, got {cfg.image_size} and {cfg.nc}"
        )


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
