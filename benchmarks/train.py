"""Training throughput beside the tutorial's loop, on the same photographs in one run: `python -m benchmarks.train`.

What the result lines claim, by variant:
    tutorial         benchmarks/plain_loop.py: float32, contiguous, Pillow in a DataLoader with two workers.
    trainer          this system as a user runs it: the settings' defaults with the feed, decoder, cache, precision and
                     step mode that they choose here, the loop, the meters, stats.jsonl and TensorBoard every
                     log.every_steps steps; one rank.  `ratio_to_tutorial` is its images/s over the tutorial's.
    trainer-fp32     the same in float32: what the arrangement brings without the arithmetic.
    trainer-nocache  the same as trainer with data.cache none: every image is decoded each time it is used.
    trainer-unwatched  the same without the vote at every step, the finite check and the watchdogs that every run has.
    trainer-saving   the same as trainer with a checkpoint in every block.  `checkpoint_s` is what one costs, in seconds
                     that the block took longer than the trainer's beside it; `checkpoint_stall_ms` how long it held up
                     the loop.  On the trainer's line, `care_percent` is what vote, watchdogs and a checkpoint every
                     checkpoint.every_images take of images/s together.
    bare-step        the trainer's own step, on one batch and one set of latents that stay in memory: what is left when
                     nothing feeds, logs or draws.  `ratio_to_bare_step` is a trainer's images/s over this.
    tutorial-compiled  the tutorial's loop with both networks under torch.compile.
    loader-2, loader-all  the trainer's step on what a DataLoader with Pillow reads, with two workers and with one for
                     each core: what is left where only the step is ours.
    peer             another program (--peer 'COMMAND'), which prints a line an iteration; stopped between its blocks.
How: all variants run in turns in one process, blocks of --steps steps, --pairs rounds, the order reversed every other
round; a ratio is the median over the rounds with its 95 % bootstrap interval.  Both loops use all cores.  The first
steps of each are not timed, neither is filling the cache, which happens once a dataset.  Checkpoints and pictures, due
every 25,000 images, are left out on both sides.  On a GPU the tutorial's convolutions use TF32, as PyTorch is set by
default; trainer-fp32 does not.
`fraction_of_gemm` is what the algorithm's FLOPs (models.step_flops) make of the rate of matrix products in the
trainer's precision, measured in the same run: 1 would be a step that does nothing else, at full speed.
`peak_gib` is the most memory that launch/train.py with these settings held, measured on a short run of its own from
start to report; `peak_gpu_gib` is what torch allocated on its GPU, `first_step_s` how long that run took from the start
of the command to the log line of its first step: measurements of what is fastest here are in it where this machine has
none of them yet, and so is filling the cache.  `data_wait_percent` is the share of the timed
blocks in which the loop waited for a batch.

Any `--section.key value` of the trainer may follow, as for launch/train.py.  Options: --help; more: NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, roofline
from benchmarks.arms import Arm, BareStep, TrainerArm, implementations
from benchmarks.harness import Recorder, say
from benchmarks.peers import LoaderArm, PeerArm
from benchmarks.plain_loop import CHANNELS, PlainLoop
from pipeline import precision
from pipeline.cli import command
from pipeline.cli.options import parse, to_yaml
from pipeline.config import Config, ConfigError
from pipeline.distributed import Ranks, num_threads
from pipeline.environment import ROOT
from pipeline.errors import UserError
from pipeline.index import Dataset, open_dataset
from pipeline.sizes import networks_of
from pipeline.sources import FolderSource

PEER_PARTS = ("tutorial-compiled", "loader-2", "loader-all")
USUAL_PARTS = ("trainer-fp32", "tutorial", "trainer", "bare-step", "trainer-nocache", "memory")
PARTS = (*USUAL_PARTS[:4], "trainer-unwatched", "trainer-saving", USUAL_PARTS[4], *PEER_PARTS, USUAL_PARTS[5])
"""In the order of their turns: what is compared most closely stands side by side."""
GROUPS = {"usual": USUAL_PARTS, "peers": PEER_PARTS}
WARM_UP_STEPS = 4
PEER_WARM_UP_LINES = 10
"""A program may print some lines before its first iteration."""
LOOK_S = 0.02
"""How often to look whether the first step has been logged."""
MEMORY_STEPS = 6
"""Steps of the run whose memory is measured: nothing grows after the second (2026-11)."""


def files_of(dataset: Dataset, folder: Path) -> list[Path]:
    """The dataset's images as single files: those of a folder where they lie, others copied out into `folder`."""
    if isinstance(dataset.source, FolderSource):
        return [dataset.source.path / dataset.key(i) for i in range(len(dataset))]
    paths = [folder / f"{i:07d}" for i in range(len(dataset))]
    folder.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(dataset.read(i).tobytes())
    return paths


def short_run(cfg: Config, device: torch.device, folder: Path) -> dict[str, float]:
    """What a short run of the real command needs: `peak_gib` of memory, of the GPU `peak_gpu_gib`, and `first_step_s`.

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
    stats = folder / "run" / "stats.jsonl"
    with (folder / "output").open("w+") as output:
        start = time.perf_counter()
        child = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | hidden)
        ended = 0
        while not (ended or (stats.exists() and stats.stat().st_size)):
            time.sleep(LOOK_S)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        first_step_s = time.perf_counter() - start
        if not ended:
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            last = (output.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"the run that measures memory ended with {child.returncode}: {last}")
    found = {"peak_gib": usage.ru_maxrss / 2**20, "first_step_s": first_step_s}  # KiB on Linux
    if device.type == "cuda":
        lines = stats.read_text().splitlines()
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
    parser.add_argument("--parts", default="usual", help=f"of {', '.join(PARTS)}; usual: {', '.join(USUAL_PARTS)}")
    parser.add_argument("--peer", action="append", default=[], help="a command that prints a line an iteration")
    parser.add_argument("--peer-batch", type=command.at_least(1), help="images of its iteration; by default --batch")
    parser.add_argument("--peer-line", default="", help="a regular expression that a line of an iteration matches")
    args, settings = parser.parse_known_args(argv)
    args.parts = [each for p in args.parts.split(",") if p for each in GROUPS.get(p, (p,))]
    for part in args.parts:
        if part not in PARTS:
            raise ConfigError(f"--parts must be of {', '.join((*GROUPS, *PARTS))}, got {part!r}")
    try:
        re.compile(args.peer_line)
    except re.error as error:
        raise ConfigError(f"--peer-line must be a regular expression, got {args.peer_line!r} ({error})") from None
    words = ["--config", args.config] if args.config else []
    words += [*settings, *(["--data.dataroot", args.data] if args.data else [])]
    words += ["--train.batch_size", str(args.batch)] if args.batch else []
    words += ["--precision", args.precision] if args.precision else []
    cfg = parse(words).config
    dataroot = harness.photographs(cfg.data.dataroot, cfg.data)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataroot=dataroot))
    harness.refuse_other_shapes(cfg.data, CHANNELS)
    return args, cfg


def in_float32(cfg: Config) -> Config:
    return dataclasses.replace(cfg, precision="fp32")


def without_cache(cfg: Config) -> Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache="none"))


def build_arms(
    args: argparse.Namespace, cfg: Config, dataset: Dataset, ranks: Ranks, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Arm]:
    """The variants that can run here, in the order of PARTS, then the peers; the stack ends them."""
    parts = args.parts
    found: dict[str, Arm] = {}
    paths: list[Path] = []
    if any(part.startswith(("tutorial", "loader")) for part in parts):
        paths = files_of(dataset, folder / "files")
    for part in ("tutorial", "tutorial-compiled"):  # first: workers are best forked before there are other threads
        if part in parts:
            found[part] = PlainLoop(
                paths,
                size=cfg.data.size[0],
                batch_size=cfg.train.batch_size,
                nz=cfg.model.nz,
                ngf=cfg.model.ngf,
                ndf=cfg.model.ndf,
                lr=cfg.optim.scaled_lr(cfg.train.batch_size),
                beta1=cfg.optim.beta1,
                device=ranks.device,
                compiled=part == "tutorial-compiled",
            )
            stack.callback(found[part].close)
    cores = len(os.sched_getaffinity(0))
    for part, workers in (("loader-2", 2), ("loader-all", cores)):
        if part == "loader-all" and cores == 2 and "loader-2" in found:
            say("loader-all is left out: all cores are 2 here")
        elif part in parts:
            found[part] = loader = LoaderArm(cfg, paths, ranks.device, workers)
            stack.callback(loader.close)
    for arm in found.values():
        if isinstance(arm, LoaderArm):
            arm.build(dataset, ranks)

    def add(name: str, own: Config, **options: bool) -> TrainerArm:
        arm = TrainerArm(own, dataset, ranks, folder / name, **options)
        stack.callback(arm.close)
        found[name] = arm
        return arm

    if "trainer" in parts or "bare-step" in parts:
        trainer = add("trainer", cfg)
        if "bare-step" in parts:
            found["bare-step"] = BareStep(trainer)
    if "trainer-unwatched" in parts:
        add("trainer-unwatched", cfg, watched=False)
    if "trainer-saving" in parts:
        add("trainer-saving", cfg, saving=True)
    if "trainer-nocache" in parts:
        add("trainer-nocache", without_cache(cfg))
    if "trainer-fp32" in parts:
        if precision.resolve(cfg.precision, ranks.device) == "fp32" and "trainer" in found:
            say("trainer-fp32 is left out: the trainer's precision is fp32 already")
        else:
            add("trainer-fp32", in_float32(cfg))
    peers: dict[str, Arm] = {}
    for i, words in enumerate(args.peer, 1):
        peer = PeerArm(words, pattern=args.peer_line)
        stack.callback(peer.close)
        peers["peer" if len(args.peer) == 1 else f"peer-{i}"] = peer
    return {name: found[name] for name in PARTS if name in found} | peers


def facts_of(arm: Arm, cfg: Config, dataset: Dataset) -> dict[str, Any]:
    """The settings that make a variant's speed."""
    trainer = arm.trainer if isinstance(arm, BareStep) else arm
    chosen: dict[str, Any]
    if isinstance(trainer, TrainerArm | LoaderArm):
        plan = trainer.plan
        chosen = {"precision": plan.precision, "cache": plan.cache, "decoder": plan.decoder, "mode": plan.mode}
        chosen |= implementations(plan)
        chosen["layout"] = "channels_last" if cfg.train.channels_last else "contiguous"
        if isinstance(trainer, LoaderArm):
            chosen["workers"] = trainer.workers
    elif isinstance(trainer, PeerArm):
        chosen = dict.fromkeys(("precision", "cache", "decoder", "mode", "layout")) | {"peer": trainer.command}
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


def care(seconds: dict[str, list[float]], cfg: Config, steps: int) -> dict[str, Any]:
    """What looking after a run costs: the share of the vote and the watchdogs, and with that of its checkpoints.

    The blocks of a round are one pair; a median over the rounds with its 95 % bootstrap interval.
    """
    found: dict[str, Any] = {}
    watched = seconds["trainer"]
    if "trainer-unwatched" not in seconds:
        return found
    bare = seconds["trainer-unwatched"]
    shares = [100 * (w / b - 1) for w, b in zip(watched, bare, strict=True)]
    estimate = harness.estimate(shares)
    found |= {"watch_percent": estimate.median, "watch_percent_interval": [estimate.low, estimate.high]}
    if "trainer-saving" in seconds and cfg.checkpoint.every_images:
        checkpoint_s = [s - w for s, w in zip(seconds["trainer-saving"], watched, strict=True)]
        # Seconds of unwatched training between two checkpoints of a real run.
        between = [b / steps / cfg.train.batch_size * cfg.checkpoint.every_images for b in bare]
        both = harness.estimate([w + 100 * c / s for w, c, s in zip(shares, checkpoint_s, between, strict=True)])
        found |= {
            "checkpoint_s": statistics.median(checkpoint_s),
            "checkpoint_every_images": cfg.checkpoint.every_images,
        }
        found |= {"care_percent": both.median, "care_percent_interval": [both.low, both.high]}
    return found


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
                    peaks[name] = short_run(own, device, folder / f"memory-{name}")
        arithmetic = precision.resolve(cfg.precision, device)
        gemm, flops = roofline.gemm_rate(arithmetic, device), networks_of(cfg).flops
        arms = build_arms(args, cfg, dataset, ranks, folder, stack)
        if not arms:
            raise ConfigError(f"--parts must name a variant to time, got {','.join(args.parts)!r}")
        for arm in arms.values():
            arm.run(PEER_WARM_UP_LINES if isinstance(arm, PeerArm) else WARM_UP_STEPS)
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
            if name == "trainer":
                facts |= care(seconds, cfg, args.steps)
            if isinstance(arm, TrainerArm) and arm.stall_ms:
                facts |= {
                    "checkpoint_stall_ms": statistics.median(arm.stall_ms),
                    "checkpoint_stall_ms_most": max(arm.stall_ms),
                }
            facts |= peaks.get(name, {}) | {"block_s": seconds[name]}
            if isinstance(arm, PeerArm):
                facts |= {"batch_size": args.peer_batch or cfg.train.batch_size, "data_wait_percent": None}
            rates = [facts["batch_size"] * args.steps / s for s in seconds[name]]
            if not isinstance(arm, PeerArm):
                facts |= {"gemm_precision": arithmetic, "gemm_gflops_per_s": gemm / 1e9}
                facts["fraction_of_gemm"] = statistics.median(rates) * flops / gemm
            to_tutorial = None
            if "tutorial" in seconds:
                tutorial = [cfg.train.batch_size * args.steps / s for s in seconds["tutorial"]]
                to_tutorial = harness.ratios(rates, tutorial)
            recorder.add(name, rates, to_tutorial, **facts)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The result lines as a table."""
    header = ("variant", "precision", "cache", "images/s", "quartiles", "ratio to tutorial", "ratio to bare step")
    lines = [
        (
            row["variant"],
            row["precision"] or "-",
            row["cache"] or "-",
            harness.shown(row["images_per_s"]),
            " to ".join(harness.shown(q) for q in row["images_per_s_quartiles"]),
            harness.shown_ratio(row, "ratio_to_tutorial", "ratio_interval"),
            harness.shown_ratio(row, "ratio_to_bare_step", "ratio_to_bare_step_interval"),
            harness.shown(row["data_wait_percent"], 2),
            f"{100 * row['fraction_of_gemm']:.1f}" if "fraction_of_gemm" in row else "-",
            harness.shown(row.get("peak_gib"), 2),
        )
        for row in rows
    ]
    return harness.table((*header, "data wait %", "of GEMM limit %", "peak GiB"), lines)


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
        for row in recorder.rows:
            if "watch_percent" in row:
                low, high = row["watch_percent_interval"]
                print(f"vote and watchdogs take {row['watch_percent']:.2f} % [{low:.2f}, {high:.2f}] of the images/s")
            if "care_percent" in row:
                low, high = row["care_percent_interval"]
                print(
                    f"with a checkpoint every {row['checkpoint_every_images']:,} images, of "
                    f"{row['checkpoint_s']:.2f} s each, they take "
                    f"{row['care_percent']:.2f} % [{low:.2f}, {high:.2f}]"
                )
            if "checkpoint_stall_ms" in row:
                print(
                    f"a checkpoint holds the loop up for {row['checkpoint_stall_ms']:.0f} ms, at most "
                    f"{row['checkpoint_stall_ms_most']:.0f}"
                )

    return command.run("benchmarks.train", body)


if __name__ == "__main__":
    sys.exit(main())
