"""The bare training step in every mode, precision and batch size, beside the tutorial's: `python -m benchmarks.step`.

What the result lines claim, by variant:
    tutorial         the plain loop's step (benchmarks/plain_loop.py): float32, contiguous, eager.
    MODE-PRECISION   the trainer's step in that train.mode and precision, eager-bf16, reference-fp32 and so on, with
                     the implementations that a run would choose here; with several --networks a third word names them.
All of one batch size take turns in one process, on the same photographs and latents, which lie in memory: nothing is
read, fed, logged or saved.  `ratio_to_tutorial` is the images/s over the tutorial's in the same rounds with its 95 %
bootstrap interval.  `tflops` counts what the algorithm needs (models.step_flops), also where a step does more;
`fraction_of_gemm` is that over the rate of matrix products in the same precision, measured in the same run.
`first_s` is the first step, compiling and choosing algorithms included.

Any `--section.key value` of the trainer may follow, as for launch/train.py.  Options: --help; more: NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, roofline
from benchmarks.arms import implementations, plan_of
from benchmarks.harness import Recorder, say
from benchmarks.plain_loop import CHANNELS, PlainLoop
from pipeline import precision, step_graph
from pipeline.assembly import Plan, build_step, make_plan
from pipeline.cli import command
from pipeline.cli.options import parse
from pipeline.config import Config, ConfigError, TrainConfig
from pipeline.config_kernels import KernelsConfig
from pipeline.distributed import Ranks, num_threads
from pipeline.feed import open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.precision import Precision
from pipeline.sampling import latents
from pipeline.sizes import networks_of

TUTORIAL = "tutorial"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
NUM_BATCHES = 4
"""That are used in turn: of a single one D would soon know every image."""
WARM_UP_STEPS = step_graph.WARM_UP_STEPS + 2
"""A graph is recorded in the step after its own warm-up."""

Batches = list[tuple[Tensor, Tensor]]
"""Images (N, H, W, C) uint8 and latents (N, nz), on the device."""


def modes() -> list[str]:
    """Every train.mode that says how a step runs."""
    return [mode for mode in typing.get_args(typing.get_type_hints(TrainConfig)["mode"]) if mode != "auto"]


def batches_of(cfg: Config, dataset: Dataset, plan: Plan, device: torch.device) -> Batches:
    """The first batches of a run, and its latents."""
    batch = cfg.train.batch_size
    feed = open_feed(
        cfg.data, dataset, seed=cfg.run.seed, shard=Slice(batch), device=device, images_seen=0, threads=1,
        decoder=plan.decoder, cached=None,
    )  # fmt: skip
    try:
        images = [feed.next().clone() for _ in range(NUM_BATCHES)]
    finally:
        feed.close()
    vectors = [latents(cfg.run.seed, Stream.LATENT, i * batch, batch, cfg.model.nz, device) for i in range(NUM_BATCHES)]
    return list(zip(images, vectors, strict=True))


class OurStep:
    """The trainer's step in one mode and precision."""

    def __init__(self, cfg: Config, dataset: Dataset, ranks: Ranks, batches: Batches) -> None:
        self.cfg, self.device, self.batches = cfg, ranks.device, batches
        self.plan = plan_of(cfg, dataset, ranks)
        precision.apply(self.plan.precision, deterministic=cfg.run.deterministic)
        self.step = build_step(cfg, self.plan, ranks)
        self.images_seen = 0

    def run(self, steps: int) -> float:
        """So many steps; the seconds they took."""
        precision.apply(self.plan.precision, deterministic=self.cfg.run.deterministic)
        batch = self.cfg.train.batch_size
        start = time.perf_counter()
        for _ in range(steps):
            images, vectors = self.batches[self.images_seen // batch % len(self.batches)]
            self.step(images, vectors, self.images_seen, batch)
            self.images_seen += batch
        harness.wait_for(self.device)
        return time.perf_counter() - start


class TutorialStep:
    """The plain loop's step on the same pixels and latents, which it finds as it wants them."""

    def __init__(self, cfg: Config, device: torch.device, batches: Batches) -> None:
        self.loop = PlainLoop(
            [], size=cfg.data.size[0], nz=cfg.model.nz, ngf=cfg.model.ngf, ndf=cfg.model.ndf,
            lr=cfg.optim.scaled_lr(cfg.train.batch_size), beta1=cfg.optim.beta1, device=device,
        )  # fmt: skip
        self.batches = [
            ((images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(), vectors[:, :, None, None])
            for images, vectors in batches
        ]
        self.device, self.done = device, 0

    def run(self, steps: int) -> float:
        """So many steps; the seconds they took."""
        self.loop.prepare()
        start = time.perf_counter()
        for _ in range(steps):
            self.loop.step(*self.batches[self.done % len(self.batches)])
            self.done += 1
        harness.wait_for(self.device)
        return time.perf_counter() - start


def with_step(cfg: Config, *, batch: int, mode: str = "auto", arithmetic: str = "auto") -> Config:
    """The settings for that step; decoded images are taken from memory, so none are cached."""
    train: Any = dataclasses.replace(cfg.train, batch_size=batch, mode=mode)  # type: ignore[arg-type]
    data = dataclasses.replace(cfg.data, cache="none")
    return dataclasses.replace(cfg, train=train, data=data, precision=arithmetic)  # type: ignore[arg-type]


def tutorials_precision(device: torch.device) -> Precision:
    """What the plain loop's convolutions compute in, as PyTorch is set by default."""
    return "tf32" if device.type == "cuda" else "fp32"


def measure_batch(
    args: argparse.Namespace, cfg: Config, dataset: Dataset, ranks: Ranks, rates: dict[str, float], recorder: Recorder
) -> None:
    """Time all steps at the batch size of cfg in turns, and record a line of each."""
    batch, device = cfg.train.batch_size, ranks.device
    batches = batches_of(cfg, dataset, make_plan(cfg, dataset, ranks), device)
    arms: dict[str, Callable[[int], float]] = {TUTORIAL: TutorialStep(cfg, device, batches).run}
    facts: dict[str, dict[str, Any]] = {TUTORIAL: {"mode": TUTORIAL, "precision": tutorials_precision(device)}}
    for mode, arithmetic, networks in itertools.product(args.modes or modes(), args.precisions, args.networks):
        name = f"{mode}-{arithmetic}" + (f"-{networks}" if len(args.networks) > 1 else "")
        own = with_step(cfg, batch=batch, mode=mode, arithmetic=arithmetic)
        if networks != "auto":
            own = dataclasses.replace(own, kernels=dataclasses.replace(own.kernels, networks=networks))
        try:
            ours = OurStep(own, dataset, ranks, batches)
        except ConfigError as error:
            if args.modes:
                raise
            say(f"{name} is left out: {error}")
            continue
        facts[name] = {"mode": mode, "precision": arithmetic} | implementations(ours.plan)
        arms[name] = ours.run
    flops = networks_of(cfg).flops
    for name, run in arms.items():
        facts[name]["first_s"] = run(1)
        run(WARM_UP_STEPS - 1)
        say(f"batch {batch}: first step of {name} after {facts[name]['first_s']:.2f} s")
    seconds = harness.paired(arms, pairs=args.pairs, steps=args.steps, say=say)
    for name, each in seconds.items():
        images_per_s = [batch * args.steps / s for s in each]
        reached = flops * harness.estimate(images_per_s).median
        recorder.add(
            name,
            images_per_s,
            harness.ratios(seconds[TUTORIAL], each),
            **facts[name],
            step_ms=1e3 * harness.estimate(each).median / args.steps,
            tflops=reached / 1e12,
            gemm_tflops=rates[facts[name]["precision"]] / 1e12,
            fraction_of_gemm=reached / rates[facts[name]["precision"]],
            batch_size=batch,
            image_size=cfg.data.size[0],
            nz=cfg.model.nz,
            ngf=cfg.model.ngf,
            ndf=cfg.model.ndf,
            threads=torch.get_num_threads(),
            device=device.type,
            pairs=args.pairs,
            steps=args.steps,
            block_s=each,
        )


def measure(args: argparse.Namespace, cfg: Config, recorder: Recorder) -> None:
    """Every batch size, one after the other, so that no more than one of them lies in memory."""
    device = harness.choose_device(args.device)
    ranks = Ranks(0, 1, 0, 1, device)
    args.precisions = args.precisions or list(dict.fromkeys(["fp32", precision.resolve("auto", device)]))
    for arithmetic in args.precisions:
        precision.resolve(arithmetic, device)  # refuses here what the device cannot do
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads(cfg.distributed, 1))
        dataset = open_dataset(cfg.data)
        rates = {each: roofline.gemm_rate(each, device) for each in {tutorials_precision(device), *args.precisions}}
        for batch in args.batches:
            measure_batch(args, with_step(cfg, batch=batch), dataset, ranks, rates, recorder)
            gc.collect()
            torch.compiler.reset()


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The result lines as a table."""
    header = ("variant", "batch", "ms a step", "images/s", "quartiles", "ratio to tutorial", "TFLOP/s", "of GEMM limit")
    lines = [
        (
            row["variant"],
            str(row["batch_size"]),
            harness.shown(row["step_ms"], 2),
            harness.shown(row["images_per_s"]),
            " to ".join(harness.shown(q) for q in row["images_per_s_quartiles"]),
            harness.shown_ratio(row, "ratio_to_tutorial", "ratio_interval"),
            harness.shown(row["tflops"], 3),
            f"{100 * row['fraction_of_gemm']:.1f} %",
        )
        for row in rows
    ]
    return harness.table(header, lines)


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command line as this program's options and the trainer's settings.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.step", __doc__.splitlines()[0] if __doc__ else "")
    harness.add_options(parser)
    parser.add_argument("--config", default="", help="settings of the trainer, as for launch/train.py")
    parser.add_argument("--batches", type=harness.numbers, default=[128], help="images a step, between commas [128]")
    parser.add_argument("--modes", type=harness.names, help=f"of {', '.join(modes())} [all that can run here]")
    parser.add_argument("--precisions", type=harness.names, help=f"of {', '.join(PRECISIONS)} [fp32 and what auto is]")
    parser.add_argument("--networks", type=harness.names, default=["auto"], help="of kernels.networks' [%(default)s]")
    parser.add_argument("--pairs", type=command.at_least(1), default=10, help="blocks of each step [%(default)s]")
    parser.add_argument("--steps", type=command.at_least(1), default=20, help="steps of a block [%(default)s]")
    args, settings = parser.parse_known_args(argv)
    implementations_of = typing.get_args(typing.get_type_hints(KernelsConfig)["networks"])
    for option, known in (("modes", modes()), ("precisions", PRECISIONS), ("networks", implementations_of)):
        for name in getattr(args, option) or ():
            if name not in known:
                raise ConfigError(f"--{option} must be of {', '.join(known)}, got {name!r}")
    words = ["--config", args.config] if args.config else []
    words += [*settings, *(["--data.dataroot", args.data] if args.data else [])]
    cfg = parse(words).config
    dataroot = harness.photographs(cfg.data.dataroot, cfg.data)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataroot=dataroot))
    harness.refuse_other_shapes(cfg.data, CHANNELS)
    return args, cfg


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args, cfg = read_arguments(words)
        recorder = Recorder("step", words, None if args.no_record else args.results)
        measure(args, cfg, recorder)
        first = recorder.rows[0]
        print(
            f"{Path(cfg.data.dataroot).name}, {first['image_size']} x {first['image_size']}, ngf {first['ngf']}, "
            f"{first['hardware']['cpu']}, {first['threads']} threads, device {first['device']}; {args.pairs} rounds of "
            f"{args.steps} steps; medians [95 % interval]"
        )
        print(summary(recorder.rows))

    return command.run("benchmarks.step", body)


if __name__ == "__main__":
    sys.exit(main())
