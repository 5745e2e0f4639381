"""Every operation at the networks' shapes, eager, compiled and as we have it: `python -m benchmarks.kernels`.

A result line is one way of doing one operation: `variant` is OPERATION/PASS/WAY, where the pass is `forward` or, with
its gradients, `both`, and the way is
    eager      the operation's definition in plain torch, as torch runs it.
    compile    the same under torch.compile (dynamic=False, fullgraph=True).
    NAME       an implementation of ours; benchmarks/kernel_cases.py has all operations.
`ms` is one call, the median of --pairs blocks; `ratio_to_eager` and `ratio_to_compile` say how often as fast it is as
those in the same rounds, with their 95 % bootstrap intervals.  `flops` and `bytes` are counted for the operation, not
measured; `bound_ms` is what they take at the rates of matrix product and copy that this run measured,
`fraction_of_bound` how much of that is reached, `limited_by` which of the two it is.  On a GPU the times are the
device's alone, and `host_ms` is what asking for a call takes.  `relative_error` is the result's distance from eager's
as a share of its norm.
A share above 1 is no mistake: inputs that fit into a cache are read faster than memory is, here as in a step, where
another operation has just written them.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, roofline
from benchmarks.harness import Recorder, say
from benchmarks.kernel_cases import ALL, Case, Cost, Setting, Way
from benchmarks.roofline import Machine
from pipeline import precision
from pipeline.cli import command
from pipeline.config import ConfigError

WAYS = ("eager", "compile", "ours")
Call = Callable[[], Sequence[Tensor]]
"""Does the work once; gives its result, and with gradients those as well."""


def forward_of(case: Case, way: Way) -> Call:
    """The operation without gradients."""
    inputs = [x.detach() for x in way.inputs or case.inputs]

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return [way.function(*inputs)]

    return call


def both_of(case: Case, way: Way) -> Call:
    """The operation and its gradients in all inputs that have one."""
    inputs = way.inputs or case.inputs
    wanted = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        upstream = torch.ones_like(way.function(*inputs))

    def call() -> Sequence[Tensor]:
        y = way.function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]

    return call


PASSES: Mapping[str, Callable[[Case, Way], Call]] = {"forward": forward_of, "both": both_of}


def ways_of(case: Case, names: Sequence[str]) -> dict[str, Way]:
    """The ways to do this operation, by name; eager is always among them."""
    found = {"eager": Way(case.reference)}
    if "compile" in names:
        torch.compiler.reset()  # each operation by itself: the limit on recompiling counts across them
        found["compile"] = Way(torch.compile(case.reference, dynamic=False, fullgraph=True))
    return found | (dict(case.ours) if "ours" in names else {})


def result_of(case: Case, pass_name: str, way: Way) -> list[Tensor]:
    """What that way comes to, in the layout of the reference."""
    return [way.as_reference(found) for found in PASSES[pass_name](case, way)()]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest distance of a tensor from what is wanted, as a share of its norm."""
    errors = []
    for one, other in zip(found, wanted, strict=True):
        norm = float(other.float().norm())
        errors.append(float((one.float() - other.float()).norm()) / norm if norm else float(one.float().norm()))
    return max(errors)


def time_calls(
    calls: Mapping[str, Call], *, pairs: int, block_s: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one call, block by block: all ways in turns, with as many calls a block as fit the slowest of them."""
    first = {}
    for name, call in calls.items():
        call()  # compiles, chooses algorithms
        first[name] = roofline.call_s(call, 2, device)
    count = min(1000, max(1, math.ceil(block_s / max(first.values()))))

    def arm(call: Call) -> Callable[[int], float]:
        return lambda steps: steps * roofline.call_s(call, steps, device)

    seconds = harness.paired({name: arm(call) for name, call in calls.items()}, pairs=pairs, steps=count)
    return {name: [s / count for s in each] for name, each in seconds.items()}


def cost_of(case: Case, pass_name: str) -> Cost:
    """What the pass costs, counted where it is not given."""
    cost = case.forward if pass_name == "forward" else case.both
    assert cost is not None
    if cost.flops is not None:
        return cost
    return Cost(roofline.counted_flops(PASSES[pass_name](case, Way(case.reference))), cost.num_bytes)


def measure_pass(
    case: Case, pass_name: str, setting: Setting, machine: Machine, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The facts of a result line for each way to do this pass."""
    cost = cost_of(case, pass_name)
    ways = ways_of(case, args.ways)
    calls = {name: PASSES[pass_name](case, way) for name, way in ways.items()}
    seconds = time_calls(calls, pairs=args.pairs, block_s=args.block_ms / 1e3, device=setting.device)
    wanted = result_of(case, pass_name, ways["eager"])
    bound_s = machine.bound_s(cost.flops or 0, cost.num_bytes)
    for name, each in seconds.items():
        found = harness.estimate(each)
        facts: dict[str, Any] = {
            "variant": f"{case.name}/{pass_name}/{name}",
            "images_per_s": [setting.batch / s for s in each],
            "ratio_to_tutorial": None,
            "operation": case.name,
            "pass": pass_name,
            "way": name,
            "shape": case.shape,
            "ms": 1e3 * found.median,
            "ms_interval": [1e3 * found.low, 1e3 * found.high],
            "flops": cost.flops,
            "bytes": cost.num_bytes,
            "bound_ms": 1e3 * bound_s,
            "fraction_of_bound": bound_s / found.median,
            "limited_by": machine.limited_by(cost.flops or 0, cost.num_bytes),
        }
        for peer in ("eager", "compile"):
            if peer in seconds and name != peer:
                ratio = harness.estimate(harness.ratios(seconds[peer], each))
                facts |= {f"ratio_to_{peer}": ratio.median, f"ratio_to_{peer}_interval": [ratio.low, ratio.high]}
        if case.same:
            facts["relative_error"] = relative_error(result_of(case, pass_name, ways[name]), wanted)
        if setting.device.type == "cuda":
            facts["host_ms"] = 1e3 * roofline.host_s(calls[name], 20, setting.device)
        yield facts


def measure(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the machine, then every operation that is asked for, and record each line at once."""
    device = harness.choose_device(args.device)
    arithmetic = precision.resolve(args.precision, device)
    setting = Setting(args.batch, device, arithmetic, args.size, args.width, args.nz)
    machine = roofline.measure(arithmetic, device)
    say(f"{arithmetic}: {machine.gemm_flops_per_s / 1e9:,.0f} GFLOP/s, {machine.copy_bytes_per_s / 1e9:,.1f} GB/s")
    common = {
        "precision": arithmetic,
        "batch_size": args.batch,
        "image_size": args.size,
        "width": args.width,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "pairs": args.pairs,
        "gemm_gflops_per_s": machine.gemm_flops_per_s / 1e9,
        "copy_gb_per_s": machine.copy_bytes_per_s / 1e9,
    }
    start, left_out = time.perf_counter(), []
    for name, cases in ALL.items():
        for case in cases(setting):
            if not any(fnmatch.fnmatch(case.name, p) or p == name for p in args.only):
                continue
            for pass_name in PASSES if case.both else ("forward",):
                if args.max_s and time.perf_counter() - start > args.max_s:
                    left_out.append(f"{case.name}/{pass_name}")
                    continue
                say(f"{case.name}/{pass_name}")
                for facts in measure_pass(case, pass_name, setting, machine, args):
                    recorder.add(**facts, **common)
    if left_out:
        say(f"left out after --max-s {args.max_s:g}: {', '.join(left_out)}")
    if not recorder.rows:
        raise ConfigError(f"--only must match an operation within --max-s, got {','.join(args.only)!r}")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The result lines as a table."""
    header = (
        "operation",
        "shape",
        "ms",
        "to eager",
        "to compile",
        "MFLOP",
        "MB",
        "bound ms",
        "reached",
        "limit",
        "error",
    )
    lines = [
        (
            row["variant"],
            row["shape"],
            harness.shown(row["ms"], 3),
            harness.shown_ratio(row, "ratio_to_eager", "ratio_to_eager_interval"),
            harness.shown_ratio(row, "ratio_to_compile", "ratio_to_compile_interval"),
            harness.shown(row["flops"] / 1e6),
            harness.shown(row["bytes"] / 1e6),
            harness.shown(row["bound_ms"], 3),
            f"{100 * row['fraction_of_bound']:.0f} %",
            row["limited_by"],
            f"{row['relative_error']:.0e}" if "relative_error" in row else "-",
        )
        for row in rows
    ]
    return harness.table(header, lines)


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.kernels", __doc__.splitlines()[0] if __doc__ else "")
    harness.add_run_options(parser)
    parser.add_argument("--batch", type=command.at_least(2), default=128, help="images [%(default)s]")
    parser.add_argument("--size", type=command.at_least(8), default=64, help="pixels of an image's side [%(default)s]")
    parser.add_argument("--width", type=command.at_least(1), default=64, help="ngf and ndf [%(default)s]")
    parser.add_argument("--nz", type=command.at_least(1), default=100, help="the latents' length [%(default)s]")
    parser.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto")
    parser.add_argument("--pairs", type=command.at_least(1), default=10, help="blocks of each way [%(default)s]")
    parser.add_argument("--block-ms", type=harness.positive, default=100.0, help="of a block, at least [%(default)s]")
    parser.add_argument("--only", type=harness.names, default=["*"], help=f"patterns of cases, or of {', '.join(ALL)}")
    parser.add_argument("--ways", type=harness.names, default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--max-s", type=harness.positive, default=0.0, help="begin no pass later than this")
    args = parser.parse_args(words)
    for way in args.ways:
        if way not in WAYS:
            raise ConfigError(f"--ways must be of {', '.join(WAYS)}, got {way!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args = read_arguments(words)
        recorder = Recorder("kernels", words, None if args.no_record else args.results)
        measure(args, recorder)
        first = recorder.rows[0]
        print(
            f"batch {first['batch_size']}, {first['precision']}, {first['hardware']['cpu']}, {first['threads']} "
            f"threads, device {first['device']}: {first['gemm_gflops_per_s']:,.0f} GFLOP/s in matrix products, "
            f"{first['copy_gb_per_s']:,.1f} GB/s in copies; {args.pairs} rounds; medians [95 % interval]"
        )
        print(summary(recorder.rows))

    return command.run("benchmarks.kernels", body)


if __name__ == "__main__":
    sys.exit(main())
