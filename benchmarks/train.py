"""Training throughput beside the tutorial's loop, on the same photographs in one run: `python -m benchmarks.train`.

What the result lines claim, by variant:
    tutorial         benchmarks/plain_loop.py: float32, contiguous, Pillow in a DataLoader with two workers.
    trainer          this system as a user runs it: the settings' defaults with the feed, decoder, cache, precision and
                     step mode that they choose here, the loop, the meters, stats.jsonl and TensorBoard every
                     log.every_steps steps; one rank.  `ratio_to_tutorial` is its images/s over the tutorial's.
    trainer-fp32     the same in float32: what the arrangement brings without the arithmetic.
    trainer-nocache  the same as trainer with data.cache none: every image is decoded each time it is used.
    bare-step        the trainer's own step, on one batch and one set of latents that stay in memory: what is left when
                     nothing feeds, logs or draws.  `ratio_to_bare_step` is a trainer's images/s over this.
How: all variants run in turns in one process, blocks of --steps steps, --pairs rounds, the order reversed every other
round; a ratio is the median over the rounds with its 95 % bootstrap interval.  Both loops use all cores.  The first
steps of each are not timed, neither is filling the cache, which happens once a dataset.  Checkpoints and pictures, due
every 25,000 images, are left out on both sides.  On a GPU the tutorial's convolutions use TF32, as PyTorch is set by
default; trainer-fp32 does not.
`peak_gib` is the most memory that launch/train.py with these settings held, measured on a short run of its own from
start to report; `peak_gpu_gib` is what torch allocated on its GPU.  `data_wait_percent` is the share of the timed
blocks in which the loop waited for a batch.

Any `--section.key value` of the trainer may follow, as for launch/train.py.  Options: --help; more: NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import harness
from benchmarks.harness import Recorder, say
from benchmarks.plain_loop import CHANNELS, PlainLoop
from pipeline import precision
from pipeline.assembly import Plan, build_step, make_plan
from pipeline.cache import build_cache
from pipeline.cli import command
from pipeline.cli.options import parse, to_yaml
from pipeline.config import Config, ConfigError
from pipeline.distributed import Ranks, num_threads
from pipeline.environment import ROOT
from pipeline.errors import UserError
from pipeline.feed import open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.loop import Maintenance, train
from pipeline.meters import Log, Meters, Progress, Timing
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.sampling import latents
from pipeline.sources import FolderSource

PARTS = ("trainer-fp32", "tutorial", "trainer", "bare-step", "trainer-nocache", "memory")
"""In the order of their turns: what is compared most closely stands side by side."""
WARM_UP_STEPS = 4
MEMORY_STEPS = 6
"""Steps of the run whose memory is measured: nothing grows after the second (2026-11)."""


class Arm(Protocol):
    """One side of a comparison."""

    @property
    def wait_s(self) -> float:
        """Seconds it has waited for data so far."""
        ...

    def run(self, steps: int) -> float:
        """Do so many steps; the seconds taken."""
        ...

    def close(self) -> None:
        """End its threads and processes."""
        ...


class TrainerArm:
    """The trainer, in blocks of steps: what pipeline.trainer puts together, without checkpoints and pictures."""

    def __init__(self, cfg: Config, dataset: Dataset, ranks: Ranks, folder: Path) -> None:
        self.cfg, self.device = cfg, ranks.device
        self.plan: Plan = make_plan(cfg, dataset, ranks)
        precision.apply(self.plan.precision, deterministic=cfg.run.deterministic)
        self.step = build_step(cfg, self.plan, ranks)
        self.shard = Slice(cfg.train.batch_size)
        self.images_seen = 0
        threads = cfg.data.workers or num_threads(cfg.distributed, 1)
        cached = None
        if self.plan.cache != "none":
            cached = build_cache(
                cfg.data, dataset, decoder=self.plan.decoder, kind=self.plan.cache, device=ranks.device, threads=threads
            )
        self.feed = open_feed(
            cfg.data, dataset, seed=cfg.run.seed, shard=self.shard, device=ranks.device, images_seen=0, threads=threads,
            decoder=self.plan.decoder, cached=cached,
        )  # fmt: skip
        folder.mkdir()
        self.meters = Meters(ranks.device, 1)
        self.progress = Progress(0, self.plan.total_images, len(dataset))
        self.log = Log(folder, self.progress, io.StringIO())
        self.timing = Timing(self.feed, 0.0)
        self.maintenance = [Maintenance(cfg.log.every_steps * cfg.train.batch_size, self._log_row)]

    @property
    def wait_s(self) -> float:
        return self.feed.wait_s

    def _log_row(self, seen: int) -> None:
        row = {"images_seen": seen, "epoch": seen / self.progress.num_images}
        row |= self.meters.read() | self.timing.read(seen - self.progress.images_seen, 1)
        self.progress.images_seen = seen
        self.log.write(row, self.progress)

    def run(self, steps: int) -> float:
        """The next steps of one long run.  A log line comes every log.every_steps and at the end of each block."""
        precision.apply(self.plan.precision, deterministic=self.cfg.run.deterministic)
        start = time.perf_counter()
        self.images_seen = train(
            self.step,
            self.feed,
            self.meters,
            self.maintenance,
            seed=self.cfg.run.seed,
            shard=self.shard,
            nz=self.cfg.model.nz,
            images_seen=self.images_seen,
            num_steps=self.images_seen // self.cfg.train.batch_size + steps,
            on_step=lambda _seen: self.log.advance(self.cfg.train.batch_size),
        )
        harness.wait_for(self.device)
        return time.perf_counter() - start

    def close(self) -> None:
        self.feed.close()
        self.log.close()


class BareStep:
    """The step of a trainer that is already there, on what lies in memory."""

    wait_s = 0.0

    def __init__(self, trainer: TrainerArm) -> None:
        # The trainer's own networks: trained on one batch alone, others would soon compute with other magnitudes.
        self.trainer = trainer
        self.images = trainer.feed.next().clone()
        count, nz = len(self.images), trainer.cfg.model.nz
        self.latents = latents(trainer.cfg.run.seed, Stream.LATENT, 0, count, nz, trainer.device)

    def run(self, steps: int) -> float:
        trainer = self.trainer
        precision.apply(trainer.plan.precision, deterministic=trainer.cfg.run.deterministic)
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step(self.images, self.latents, trainer.images_seen, trainer.cfg.train.batch_size)
        harness.wait_for(trainer.device)
        return time.perf_counter() - start

    def close(self) -> None:
        pass


def files_of(dataset: Dataset, folder: Path) -> list[Path]:
    """The dataset's images as single files: those of a folder where they lie, others copied out into `folder`."""
    if isinstance(dataset.source, FolderSource):
        return [dataset.source.path / dataset.key(i) for i in range(len(dataset))]
    paths = [folder / f"{i:07d}" for i in range(len(dataset))]
    folder.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(dataset.read(i).tobytes())
    return paths


def peak_memory(cfg: Config, device: torch.device, folder: Path) -> dict[str, float]:
    """The most memory that a short run of the real command holds, in GiB: `peak_gib` of the process, and of the GPU.

    To be called before this process has grown large: a child starts out with its parent's peak in its account.

    Raises:
        UserError: the run failed.
    """
    folder.mkdir()
    short = dataclasses.replace(cfg.train, num_epochs=1e9, max_images=MEMORY_STEPS * cfg.train.batch_size)
    log = dataclasses.replace(cfg.log, every_steps=1)
    run = dataclasses.replace(cfg.run, dir=str(folder / "run"), resume="auto", init_from="")
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(cfg, train=short, log=log, run=run)))
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(folder / "config.yaml")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    with (folder / "output").open("w+") as output:
        child = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | hidden)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            last = (output.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"the run that measures memory ended with {child.returncode}: {last}")
    found = {"peak_gib": usage.ru_maxrss / 2**20}  # KiB on Linux
    if device.type == "cuda":
        lines = (folder / "run" / "stats.jsonl").read_text().splitlines()
        found["peak_gpu_gib"] = json.loads(lines[-1])["memory_gib"]
    return found


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command line as this program's options and the trainer's settings.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.train", __doc__.splitlines()[0] if __doc__ else "")
    harness.add_options(parser)
    parser.add_argument("--config", default="", help="settings of the trainer, as for launch/train.py")
    parser.add_argument("--batch", type=command.at_least(2), help="images a step; by default the settings', 128")
    parser.add_argument("--pairs", type=command.at_least(1), default=10, help="blocks of each variant")
    parser.add_argument("--steps", type=command.at_least(1), default=20, help="steps of a block")
    parser.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), help="of the trainer")
    parser.add_argument("--parts", default=",".join(PARTS), help="which variants, by default %(default)s")
    args, settings = parser.parse_known_args(argv)
    args.parts = [p for p in args.parts.split(",") if p]
    for part in args.parts:
        if part not in PARTS:
            raise ConfigError(f"--parts must be of {', '.join(PARTS)}, got {part!r}")
    words = ["--config", args.config] if args.config else []
    words += [*settings, *(["--data.dataroot", args.data] if args.data else [])]
    words += ["--train.batch_size", str(args.batch)] if args.batch else []
    words += ["--precision", args.precision] if args.precision else []
    cfg = parse(words).config
    dataroot = harness.photographs(cfg.data.dataroot, cfg.data)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataroot=dataroot))
    height, width = cfg.data.size
    if height != width or height & (height - 1) or cfg.data.nc != CHANNELS:
        raise ConfigError(
            f"data.image_size and data.nc must be a power of two and {CHANNELS}, which is what the tutorial's networks "
            f"take, got {cfg.data.image_size} and {cfg.data.nc}"
        )
    return args, cfg


def in_float32(cfg: Config) -> Config:
    return dataclasses.replace(cfg, precision="fp32")


def without_cache(cfg: Config) -> Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache="none"))


def build_arms(
    parts: Sequence[str], cfg: Config, dataset: Dataset, ranks: Ranks, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Arm]:
    """The variants that can run here, in the order of PARTS; the stack ends them."""
    found: dict[str, Arm] = {}
    if "tutorial" in parts:  # first, so that its workers are forked from a process without other threads
        found["tutorial"] = PlainLoop(
            files_of(dataset, folder / "files"),
            size=cfg.data.size[0],
            batch_size=cfg.train.batch_size,
            nz=cfg.model.nz,
            ngf=cfg.model.ngf,
            ndf=cfg.model.ndf,
            lr=cfg.optim.scaled_lr(cfg.train.batch_size),
            beta1=cfg.optim.beta1,
            device=ranks.device,
        )
        stack.callback(found["tutorial"].close)

    def add(name: str, own: Config) -> TrainerArm:
        arm = TrainerArm(own, dataset, ranks, folder / name)
        stack.callback(arm.close)
        found[name] = arm
        return arm

    if "trainer" in parts or "bare-step" in parts:
        trainer = add("trainer", cfg)
        if "bare-step" in parts:
            found["bare-step"] = BareStep(trainer)
    if "trainer-nocache" in parts:
        add("trainer-nocache", without_cache(cfg))
    if "trainer-fp32" in parts:
        if precision.resolve(cfg.precision, ranks.device) == "fp32" and "trainer" in found:
            say("trainer-fp32 is left out: the trainer's precision is fp32 already")
        else:
            add("trainer-fp32", in_float32(cfg))
    return {name: found[name] for name in PARTS if name in found}


def facts_of(arm: Arm, cfg: Config, dataset: Dataset) -> dict[str, Any]:
    """The settings that make a variant's speed."""
    trainer = arm.trainer if isinstance(arm, BareStep) else arm
    if isinstance(trainer, TrainerArm):
        plan = trainer.plan
        chosen = {"precision": plan.precision, "cache": plan.cache, "decoder": plan.decoder, "mode": plan.mode}
        chosen["layout"] = "channels_last" if cfg.train.channels_last else "contiguous"
    else:
        chosen = {"precision": "fp32", "cache": "none", "decoder": "pillow", "mode": "tutorial", "layout": "contiguous"}
    return chosen | {
        "batch_size": cfg.train.batch_size,
        "image_size": cfg.data.size[0],
        "nz": cfg.model.nz,
        "ngf": cfg.model.ngf,
        "ndf": cfg.model.ndf,
        "threads": torch.get_num_threads(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "data": Path(cfg.data.dataroot).name,
        "num_images": len(dataset),
    }


def measure(args: argparse.Namespace, cfg: Config, recorder: Recorder) -> None:
    """Run the variants in turns and record a line of each."""
    device = harness.choose_device(args.device)
    ranks = Ranks(0, 1, 0, 1, device)
    dataset = open_dataset(cfg.data)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-train-")))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads(cfg.distributed, 1))
        peaks: dict[str, dict[str, float]] = {}
        if "memory" in args.parts:
            for name, own in (("trainer", cfg), ("trainer-fp32", in_float32(cfg))):
                if name in args.parts:
                    say(f"memory of {name}: a run of {MEMORY_STEPS} steps")
                    peaks[name] = peak_memory(own, device, folder / f"memory-{name}")
        arms = build_arms(args.parts, cfg, dataset, ranks, folder, stack)
        if not arms:
            raise ConfigError(f"--parts must name a variant to time, got {','.join(args.parts)!r}")
        for arm in arms.values():
            arm.run(WARM_UP_STEPS)
        waited = {name: arm.wait_s for name, arm in arms.items()}
        blocks = {name: arm.run for name, arm in arms.items()}
        seconds = harness.paired(blocks, pairs=args.pairs, steps=args.steps, say=say)
        for name, arm in arms.items():
            facts = facts_of(arm, cfg, dataset) | {"device": device.type, "pairs": args.pairs, "steps": args.steps}
            facts |= {"data_wait_percent": 100 * (arm.wait_s - waited[name]) / sum(seconds[name])}
            if name.startswith("trainer") and name != "trainer-fp32" and "bare-step" in seconds:
                to_bare = harness.estimate(harness.ratios(seconds["bare-step"], seconds[name]))
                facts |= {
                    "ratio_to_bare_step": to_bare.median,
                    "ratio_to_bare_step_interval": [to_bare.low, to_bare.high],
                }
            facts |= peaks.get(name, {}) | {"block_s": seconds[name]}
            to_tutorial = harness.ratios(seconds["tutorial"], seconds[name]) if "tutorial" in seconds else None
            rates = [cfg.train.batch_size * args.steps / s for s in seconds[name]]
            recorder.add(name, rates, to_tutorial, **facts)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The result lines as a table."""
    header = ("variant", "precision", "cache", "images/s", "quartiles", "ratio to tutorial", "ratio to bare step")
    lines = [
        (
            row["variant"],
            row["precision"],
            row["cache"],
            harness.shown(row["images_per_s"]),
            " to ".join(harness.shown(q) for q in row["images_per_s_quartiles"]),
            harness.shown_ratio(row, "ratio_to_tutorial", "ratio_interval"),
            harness.shown_ratio(row, "ratio_to_bare_step", "ratio_to_bare_step_interval"),
            harness.shown(row["data_wait_percent"], 2),
            harness.shown(row.get("peak_gib"), 2),
        )
        for row in rows
    ]
    return harness.table((*header, "data wait %", "peak GiB"), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args, cfg = read_arguments(words)
        recorder = Recorder("train", words, None if args.no_record else args.results)
        measure(args, cfg, recorder)
        first = recorder.rows[0]
        print(
            f"{first['num_images']} images of {first['data']}, {first['image_size']} x {first['image_size']}, "
            f"batch {first['batch_size']}, ngf {first['ngf']}, {first['hardware']['cpu']}, {first['threads']} threads, "
            f"device {first['device']}; {args.pairs} rounds of {args.steps} steps; medians [95 % interval]"
        )
        print(summary(recorder.rows))

    return command.run("benchmarks.train", body)


if __name__ == "__main__":
    sys.exit(main())
