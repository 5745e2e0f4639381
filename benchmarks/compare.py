"""One benchmark on two commits in turn: `python -m benchmarks.compare BASE -- train --parts trainer --pairs 1`.

    python -m benchmarks.compare [--repeats 10] BASE -- NAME [options of benchmarks.NAME]
BASE (a commit, branch or tag) is checked out into a temporary folder; the other side is this working tree as it is.
The benchmark runs in short runs, base and tree in turns, the order reversed every other repeat; one more run of each
comes first, compiles and fills caches, and is not counted.  A result line is one of the benchmark's variants:
`images_per_s` of the tree, the median over the repeats, `ratio_to_base` how often as fast it is as BASE in the same
repeat with its 95 % bootstrap interval.  Above 1 the tree is faster; an interval that holds 1 says nothing.

Make the runs short (`--pairs 1 --steps 20`) and the repeats many: what drifts, drifts between runs.  Both sides read
the same files from the same caches.  The options must be known to both commits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Recorder, say
from pipeline.cli import command
from pipeline.config import ConfigError
from pipeline.environment import ROOT
from pipeline.errors import UserError
from pipeline.files import read_objects

BASE, TREE = "base", "tree"


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """A git command on this clone."""
    return subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, text=True)


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[tuple[Path, str]]:
    """A folder with the files of that commit, and the commit's full name; the folder is gone afterwards.

    Raises:
        ConfigError: there is no such commit.
    """
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise ConfigError(f"BASE must be a commit of {ROOT}, got {revision!r}")
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="benchmark-compare-") as name:
        folder = Path(name) / "base"
        added = git("worktree", "add", "--detach", str(folder), commit)
        if added.returncode:
            raise UserError(f"git worktree add: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield folder, commit
        finally:
            git("worktree", "remove", "--force", str(folder))


def run_once(folder: Path, words: Sequence[str], results: Path) -> dict[str, float]:
    """Images a second by variant, of one run of the benchmark in that folder's code.

    Raises:
        UserError: it failed, or recorded nothing that compares.
    """
    name, *options = words
    environment = os.environ | {"PYTHONPATH": str(folder)}
    # -P: not the current folder, which holds the other side's code, but PYTHONPATH; and paths in options stay right.
    line = [sys.executable, "-P", "-m", f"benchmarks.{name}", *options, "--results", str(results)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"benchmarks.{name} in {folder} ended with {done.returncode}: {last}")
    rates = {row_name(row): row["images_per_s"] for row in read_objects(results / f"{name}.jsonl")}
    if not rates:
        raise UserError(f"benchmarks.{name} in {folder} recorded no line")
    return rates


def row_name(row: dict[str, Any]) -> str:
    """The variant, with its batch size where a benchmark has several."""
    return f"{row['variant']}, batch {row['batch_size']}" if "batch_size" in row else row["variant"]


def measure(args: argparse.Namespace, recorder: Recorder) -> None:
    """Run both sides in turns and record a line of each variant that both have."""
    rates: dict[str, list[dict[str, float]]] = {BASE: [], TREE: []}
    with checked_out(args.base) as (folder, commit), tempfile.TemporaryDirectory(prefix="benchmark-") as results:
        sides = {BASE: folder, TREE: ROOT}
        for side, code in sides.items():
            say(f"{side}: a run that is not counted")
            run_once(code, args.benchmark, Path(results) / side)
        for repeat, side in harness.turns(list(sides), args.repeats):
            found = run_once(sides[side], args.benchmark, Path(results) / f"{side}-{repeat}")
            rates[side].append(found)
            told = ", ".join(f"{name} {rate:,.1f}" for name, rate in found.items())
            say(f"repeat {repeat + 1}/{args.repeats}  {side}  images/s: {told}")
    every = [each for side in rates.values() for each in side]
    common = [name for name in rates[TREE][0] if all(name in each for each in every)]
    for name in set().union(*every) - set(common):
        say(f"{name} is left out: some run has it not")
    if not common:
        raise UserError(f"benchmarks.{args.benchmark[0]} has no variant in both commits")
    for name in common:
        mine, theirs = ([each[name] for each in rates[side]] for side in (TREE, BASE))
        ratio = harness.estimate(harness.ratios(mine, theirs))
        recorder.add(
            name,
            mine,
            None,
            ratio_to_base=ratio.median,
            ratio_to_base_interval=[ratio.low, ratio.high],
            base=commit,
            base_images_per_s=harness.estimate(theirs).median,
            of=shlex.join(args.benchmark),
            repeats=args.repeats,
        )


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` is the benchmark and its options.

    Raises:
        ConfigError: one line.
    """
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    parser = command.Parser("benchmarks.compare", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--repeats", type=command.at_least(1), default=10, help="runs of each side [%(default)s]")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result lines")
    parser.add_argument("--no-record", action="store_true", help="print only; append no result lines")
    args = parser.parse_args(words[:cut])
    benchmark = words[cut + 1 :]
    if benchmark[:2] == ["python", "-m"]:
        benchmark = benchmark[2:]
    if not benchmark:
        raise ConfigError("after BASE there must be -- and a benchmark, such as -- train --parts trainer")
    name = benchmark[0].removeprefix("benchmarks.")
    if not (ROOT / "benchmarks" / f"{name}.py").is_file() or name == "compare":
        raise ConfigError(f"after -- there must be a benchmark's name, got {benchmark[0]!r}")
    args.benchmark = [name, *benchmark[1:]]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args = read_arguments(words)
        recorder = Recorder("compare", words, None if args.no_record else args.results)
        measure(args, recorder)
        first = recorder.rows[0]
        tree = f"{first['commit'][:12]}{' with changes' if first['dirty'] else ''}"
        print(f"{first['of']}: {tree} against {first['base'][:12]}; {args.repeats} repeats; medians [95 % interval]")
        header = ("variant", "images/s", "of BASE", "ratio to BASE")
        lines = [
            (
                row["variant"],
                harness.shown(row["images_per_s"]),
                harness.shown(row["base_images_per_s"]),
                harness.shown_ratio(row, "ratio_to_base", "ratio_to_base_interval"),
            )
            for row in recorder.rows
        ]
        print(harness.table(header, lines))

    return command.run("benchmarks.compare", body)


if __name__ == "__main__":
    sys.exit(main())
