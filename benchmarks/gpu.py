"""Everything that a GPU shows, in one command of at most nine minutes and one JSON file: `python -m benchmarks.gpu`.

The parts, most telling first, each a program of its own as one may run it by hand:
    train         training end to end beside the plain tutorial loop, with the cache and without one.
    step          the bare step in every mode at batch 128, 512 and 2048.
    kernels       what may be fused, eager, compiled and ours, at the same batches.
    convolutions  the others, eager and ours.
    data          decoding by DALI and Pillow, the host's and the GPU's cache.
    tune          the search for DALI's settings.
    compiled      training beside the plain loop under torch.compile, in what time is left.
A part has seconds of its own.  One that is over its time is ended, with what it had recorded until then (step and
kernels record as they go, the others at their end); one for which
too little is left of --minutes is not begun; one that fails does not take the others with it.  Each of these is printed
and stands in the file as the part's `state`: done, out of time, skipped, failed.
The file: `parts`, each with name, state, seconds, command, and `rows` as in benchmarks/results/, beside what the whole
ran on.  The rows go to --results as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import say
from pipeline import environment
from pipeline.cli import command
from pipeline.config import ConfigError, DataConfig
from pipeline.environment import ROOT
from pipeline.errors import StorageError
from pipeline.files import read_objects, written_aside

BATCHES = (128, 512, 2048)
TRAINED = "tutorial,trainer,bare-step,trainer-nocache"
FUSED = "normalize,gather,adam-ema,bn-*,conv-leaky-*,conv-transpose-tanh-*"
CONVOLUTIONS = "conv-[0-9]*,conv-transpose-[0-9]*"
"""By themselves: torch.compile leaves them to the vendor's library, as eager does, and would take minutes to."""
TAKES_PHOTOGRAPHS = ("train", "step", "data")
LEAST_S = 15.0
"""A program needs so long to start; with less left it is not begun."""
GRACE_S = 5.0
"""Between being told to end and being killed."""


@dataclass(frozen=True)
class Part:
    """One program of the whole."""

    name: str
    seconds: float
    """That it may take."""
    words: str
    """The benchmark and its options, but for --results and the photographs."""


def parts_of(device: str, threads: int) -> list[Part]:
    """All parts; the seconds of all but the last, which takes what is left, add up to less than nine minutes."""
    batches = ",".join(map(str, BATCHES))
    kernels = f"kernels --batch {batches} --pairs 5 --block-ms 10 --device {device}"
    return [
        Part("train", 110, f"train --parts {TRAINED} --pairs 5 --steps 20 --device {device}"),
        Part("step", 160, f"step --batches {batches} --precisions bf16 --pairs 5 --steps 10 --device {device}"),
        Part("kernels", 125, f"{kernels} --max-s 110 --only {FUSED}"),
        Part("convolutions", 40, f"{kernels} --max-s 28 --only {CONVOLUTIONS} --ways eager,ours"),
        Part(
            "data", 45,
            f"data --only folder-*,plain-*,cache-* --seconds 0.5 --repeats 3 --threads {threads} --device {device}",
        ),
        Part("tune", 25, f"data --tune --seconds 0.2 --repeats 1 --device {device}"),
        Part("compiled", 120, f"train --parts tutorial,tutorial-compiled,trainer --pairs 5 --device {device}"),
    ]  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """End it and what it has started."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, data: str, seconds: float, results: Path) -> dict[str, Any]:
    """Run one part for at most so many seconds; what the file says of it."""
    name, *options = shlex.split(part.words)
    photographs = ["--data", data] if name in TAKES_PHOTOGRAPHS else []
    words = ["-m", f"benchmarks.{name}", *options, *photographs, "--results", str(results)]
    found: dict[str, Any] = {"name": part.name, "command": shlex.join(["python", *words[:-2]])}
    start = time.perf_counter()
    with (results / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=output, stderr=output, text=True, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)  # also workers that a failed program has left
        output.seek(0)
        printed = output.read().strip().splitlines()
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["state"] = "out of time" if code is None else "failed" if code else "done"
    if code:
        found["error"] = printed[-1] if printed else f"no output, exit code {code}"
    found["rows"] = read_objects(results / f"{name}.jsonl")
    return found


def run_parts(parts: Sequence[Part], data: str, whole_s: float) -> list[dict[str, Any]]:
    """Part after part, as long as there is time."""
    start, found = time.perf_counter(), []
    for part in parts:
        left = whole_s - (time.perf_counter() - start)
        if left < LEAST_S:
            found.append({"name": part.name, "state": "skipped", "seconds": 0.0, "rows": []})
            say(f"{part.name}: skipped, {max(0.0, left):.0f} s are left")
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
            one = run_part(part, data, min(part.seconds, left - GRACE_S), Path(folder))
        found.append(one)
        why = f" ({one['error']})" if "error" in one else ""
        say(f"{part.name}: {one['state']}{why}, {len(one['rows'])} rows in {one['seconds']:.0f} s")
    return found


def write(found: Sequence[dict[str, Any]], words: Sequence[str], out: Path, results: Path | None) -> None:
    """The file, and the rows among the others.

    Raises:
        StorageError: one of them cannot be written.
    """
    whole = environment.describe() | {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *words]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": list(found),
    }
    try:
        with written_aside(out) as aside:
            aside.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
        for row in (row for part in found for row in part["rows"]) if results else ():
            assert results is not None
            results.mkdir(parents=True, exist_ok=True)
            with (results / f"{row['benchmark']}.jsonl").open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise StorageError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from error


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.gpu", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="", help="photographs; without it cartoon faces are drawn")
    parser.add_argument("--minutes", type=harness.positive, default=9.0, help="that it may take [%(default)s]")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu.json", help="the file [%(default)s]")
    parser.add_argument("--only", type=harness.names, help="parts, by name [all]")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result lines")
    parser.add_argument("--no-record", action="store_true", help="only the file; append no result lines")
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise ConfigError("a CUDA device must be there, torch finds none")
    known = [part.name for part in parts_of("cuda", 1)]
    for name in args.only or ():
        if name not in known:
            raise ConfigError(f"--only must be of {', '.join(known)}, got {name!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write; the exit code is 0, that of a user's error, or 1 where a part failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    failed: list[str] = []

    def body() -> None:
        args = read_arguments(words)
        start = time.perf_counter()
        data = str(Path(harness.photographs(args.data, DataConfig())).resolve())
        parts = parts_of("cuda", len(os.sched_getaffinity(0)))
        chosen = [part for part in parts if not args.only or part.name in args.only]
        found = run_parts(chosen, data, 60 * args.minutes - (time.perf_counter() - start))
        write(found, words, args.out, None if args.no_record else args.results)
        lines = [(p["name"], p["state"], harness.shown(p["seconds"], 0), str(len(p["rows"]))) for p in found]
        print(harness.table(("part", "state", "seconds", "rows"), lines))
        print(f"wrote {args.out}")
        failed.extend(part["name"] for part in found if part["state"] == "failed")

    return command.run("benchmarks.gpu", body) or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
