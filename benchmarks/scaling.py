"""Training on 1, 2, 4 ranks of this machine, and a model of 8 to 512 GPUs: `python -m benchmarks.scaling`.

What the result lines claim, by variant:
    weak-W        W ranks, each with a batch of its own of --batch images: launch/train.py under torchrun, as a user
                  starts it (launch/run.py), with a cache, the vote and the log, without pictures.
    strong-W      the same on one batch of --batch images that the ranks share.
    model-weak, model-strong   many GPUs by benchmarks/scaling_model.py: from the step as it was measured on one, the
                  bytes of the gradients and the links' figures.  Its assumptions stand in the line.
Each run trains --windows + 1 times --steps steps; the first window is not counted, `images_per_s` is the median of the
others.  The runs of a repeat follow each other, the order reversed every other time; `ratio_to_one` is the images/s
over those of one rank in the same repeat with its 95 % bootstrap interval, `efficiency` that over W.  All ranks have as
many threads as the largest number of ranks leaves each (--threads); `oversubscribed` says that ranks shared cores.

The model takes the step from --step-ms BATCH=MS,..., else from the newest rows of a GPU in step.jsonl; without either
there is none.  Any `--section.key value` of the trainer may follow.  Options: --help; more: NOTES.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, scaling_model
from benchmarks.harness import Recorder, say
from benchmarks.scaling_model import BETWEEN, WITHIN, Cluster, Network, Point
from pipeline.assembly import build_networks
from pipeline.cli import command
from pipeline.cli.options import parse, to_yaml
from pipeline.config import Config, ConfigError
from pipeline.environment import ROOT
from pipeline.errors import UserError
from pipeline.files import read_objects
from pipeline.models import forward_flops, step_flops
from pipeline.sizes import FLOAT


@dataclasses.dataclass(frozen=True)
class Job:
    """One way of training: so many ranks on so many images a step."""

    name: str
    ranks: int
    batch: int


def jobs_of(ranks: Sequence[int], batch: int) -> list[Job]:
    """Weak and strong scaling; on one rank both are the same, called weak-1."""
    found = [Job("weak-1", 1, batch)]
    for number in sorted(set(ranks) - {1}):
        found.append(Job(f"weak-{number}", number, number * batch))
        if batch % number == 0 and batch >= 2 * number:
            found.append(Job(f"strong-{number}", number, batch))
        else:
            say(f"strong-{number} is left out: {batch} images cannot be shared evenly, two or more a rank")
    return found


def windows_of(job: Job, cfg: Config, args: argparse.Namespace, folder: Path) -> list[float]:
    """Images a second in each counted window of one run of the real command.

    Raises:
        UserError: the run failed.
    """
    folder.mkdir()
    train = dataclasses.replace(
        cfg.train, batch_size=job.batch, num_epochs=1e9, max_images=(args.windows + 1) * args.steps * job.batch
    )
    own = dataclasses.replace(
        cfg,
        train=train,
        log=dataclasses.replace(cfg.log, every_steps=args.steps, grid_every_images=0, report=False),
        checkpoint=dataclasses.replace(cfg.checkpoint, every_images=0),
        distributed=dataclasses.replace(cfg.distributed, threads=args.threads),
        data=dataclasses.replace(cfg.data, workers=args.threads),
        run=dataclasses.replace(cfg.run, dir=str(folder / "run"), resume="none", init_from=""),
    )
    (folder / "config.yaml").write_text(to_yaml(own))
    words = [sys.executable]
    if job.ranks > 1:
        words += [str(ROOT / "launch" / "run.py"), "--standalone", f"--nproc_per_node={job.ranks}"]
    words += [str(ROOT / "launch" / "train.py"), "--config", str(folder / "config.yaml")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | hidden)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the run on {job.ranks} rank(s) ended with {done.returncode}: {last}")
    rows = [json.loads(line) for line in (folder / "run" / "stats.jsonl").read_text().splitlines()]
    return [row["images_per_s"] for row in rows[1:]]


def measure(args: argparse.Namespace, cfg: Config, recorder: Recorder) -> None:
    """Run the jobs in turns and record a line of each."""
    jobs = {job.name: job for job in jobs_of(args.ranks, args.batch)}
    rates: dict[str, list[list[float]]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as folder:
        for repeat, name in harness.turns(list(jobs), args.repeats):
            found = windows_of(jobs[name], cfg, args, Path(folder) / f"{name}-{repeat}")
            rates[name].append(found)
            say(f"repeat {repeat + 1}/{args.repeats}  {name:<10} {statistics.median(found):10,.1f} images/s")
    cores, device = len(os.sched_getaffinity(0)), harness.choose_device(args.device)
    one = [statistics.median(windows) for windows in rates["weak-1"]]
    for name, job in jobs.items():
        ratio = harness.estimate(harness.ratios([statistics.median(w) for w in rates[name]], one))
        recorder.add(
            name,
            [rate for windows in rates[name] for rate in windows],
            None,
            ratio_to_one=ratio.median,
            ratio_to_one_interval=[ratio.low, ratio.high],
            efficiency=ratio.median / job.ranks,
            efficiency_interval=[ratio.low / job.ranks, ratio.high / job.ranks],
            ranks=job.ranks,
            batch_size=job.batch,
            image_size=cfg.data.size[0],
            ngf=cfg.model.ngf,
            ndf=cfg.model.ndf,
            threads=args.threads,
            oversubscribed=device.type == "cpu" and job.ranks * args.threads > cores,
            device=device.type,
            repeats=args.repeats,
            steps=args.steps,
            windows=args.windows,
            data=Path(cfg.data.dataroot).name,
        )


# The model


def networks_for(cfg: Config) -> tuple[Network, Network]:
    """Generator and discriminator as the model wants them; backward's share of a step goes by its FLOPs."""
    generator, discriminator = build_networks(cfg, torch.device("meta"))
    g, d = (forward_flops(network, *cfg.data.size) for network in (generator, discriminator))
    whole = step_flops(generator, discriminator, *cfg.data.size)
    found = []
    # D's backward is that of real and fake together; the gradient of the photographs is not taken, nor the latents'.
    for network, backward in ((generator, 2 * sum(g) - g[0]), (discriminator, 2 * (2 * sum(d) - d[0]))):
        num_bytes = FLOAT * sum(p.numel() for p in network.parameters())
        buckets = max(1, math.ceil(num_bytes / (cfg.distributed.bucket_cap_mb * 2**20)))
        found.append(Network(num_bytes, buckets, backward / whole))
    return found[0], found[1]


def recorded_steps(path: Path) -> tuple[dict[int, float], str]:
    """Seconds of the fastest step of a GPU by batch size, from the newest run in step.jsonl, and which run that was.

    Raises:
        StorageError: the file is there and cannot be read as rows.
    """
    rows = [row for row in read_objects(path) if row["device"] == "cuda"] if path.is_file() else []
    if not rows:
        return {}, ""
    newest = rows[-1]
    run = [row for row in rows if (row["commit"], row["date"]) == (newest["commit"], newest["date"])]
    found: dict[int, float] = {}
    for row in run:
        if row["variant"] != "tutorial":
            step_s = row["batch_size"] / row["images_per_s"]
            found[row["batch_size"]] = min(step_s, found.get(row["batch_size"], math.inf))
    gpu = (newest["hardware"]["gpus"] or ["a GPU"])[0]
    return found, f"{path.name}, commit {newest['commit'][:12]}, {gpu}"


def model(args: argparse.Namespace, cfg: Config, recorder: Recorder) -> None:
    """Work the model out and record both of its lines."""
    measured, source = args.step_ms, "--step-ms"
    if not measured:
        measured, source = recorded_steps(args.results / "step.jsonl")
    if not measured:
        say("no model: step.jsonl has no row of a GPU, and --step-ms gives none")
        return
    networks = networks_for(cfg)
    cluster = Cluster(WITHIN[args.within], BETWEEN[args.between], args.gpus_per_node, args.achieved)
    per_gpu = args.gpu_batch or max(measured)
    points = {
        "model-weak": [scaling_model.weak(per_gpu, n, measured, networks, cluster) for n in args.gpus],
        "model-strong": [
            scaling_model.strong(args.global_batch, n, measured, networks, cluster)
            for n in args.gpus
            if args.global_batch >= 2 * n
        ],
    }
    for name, each in points.items():
        if each:
            recorder.note(
                variant=name,
                images_per_s=each[-1].images_per_s,
                ratio_to_tutorial=None,
                points=[dataclasses.asdict(point) for point in each],
                batch_size=per_gpu if name == "model-weak" else args.global_batch,
                step_ms={str(batch): 1e3 * s for batch, s in sorted(measured.items())},
                step_ms_from=source,
                cluster=dataclasses.asdict(cluster),
                networks=[dataclasses.asdict(network) for network in networks],
                device="cuda",
            )


def batch_ms(text: str) -> dict[int, float]:
    """An argparse type: BATCH=MS between commas, as {batch: seconds}."""
    found = {}
    for word in harness.names(text):
        batch, _, ms = word.partition("=")
        found[command.at_least(1)(batch)] = harness.positive(ms) / 1e3
    return found


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command line as this program's options and the trainer's settings.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.scaling", __doc__.splitlines()[0] if __doc__ else "")
    harness.add_options(parser)
    parser.add_argument("--config", default="", help="settings of the trainer, as for launch/train.py")
    parser.add_argument("--ranks", type=harness.numbers, default=[1, 2, 4], help="numbers of ranks [1,2,4]")
    parser.add_argument("--batch", type=command.at_least(2), default=128, help="images of a rank, weak [%(default)s]")
    parser.add_argument("--steps", type=command.at_least(1), default=10, help="steps of a window [%(default)s]")
    parser.add_argument("--windows", type=command.at_least(1), default=2, help="counted windows a run [%(default)s]")
    parser.add_argument("--repeats", type=command.at_least(1), default=5, help="runs of each [%(default)s]")
    parser.add_argument("--threads", type=command.at_least(1), help="of each rank [cores / most ranks, at least 1]")
    parser.add_argument("--model-only", action="store_true", help="measure nothing")
    parser.add_argument("--step-ms", type=batch_ms, default={}, help="BATCH=MS,...: measured steps of one GPU")
    parser.add_argument("--gpus", type=harness.numbers, default=[1, 8, 16, 32, 64, 128, 256, 512], help="of the model")
    parser.add_argument("--gpu-batch", type=command.at_least(2), help="images of a GPU, weak [the largest measured]")
    parser.add_argument("--global-batch", type=command.at_least(2), default=4096, help="images, strong [%(default)s]")
    parser.add_argument("--within", choices=tuple(WITHIN), default="nvlink4", help="a node [%(default)s]")
    parser.add_argument("--between", choices=tuple(BETWEEN), default="ndr", help="nodes [%(default)s]")
    parser.add_argument("--gpus-per-node", type=command.at_least(1), default=Cluster().gpus_per_node)
    parser.add_argument("--achieved", type=harness.positive, default=Cluster().achieved, help="of a link's bandwidth")
    args, settings = parser.parse_known_args(argv)
    if args.achieved > 1:
        raise ConfigError(f"--achieved must be at most 1, got {args.achieved:g}")
    args.threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(args.ranks))
    words = ["--config", args.config] if args.config else []
    words += [*settings, *(["--data.dataroot", args.data] if args.data else [])]
    cfg = parse(words).config
    if not args.model_only:
        dataroot = harness.photographs(cfg.data.dataroot, cfg.data)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataroot=dataroot))
    return args, cfg


def measured_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs of this machine."""
    header = ("variant", "batch", "images/s", "quartiles", "to one rank", "efficiency", "threads a rank")
    lines = [
        (
            row["variant"],
            str(row["batch_size"]),
            harness.shown(row["images_per_s"]),
            " to ".join(harness.shown(q) for q in row["images_per_s_quartiles"]),
            harness.shown_ratio(dict(row), "ratio_to_one", "ratio_to_one_interval"),
            harness.shown_ratio(dict(row), "efficiency", "efficiency_interval"),
            f"{row['threads']}{', shared cores' if row['oversubscribed'] else ''}",
        )
        for row in rows
    ]
    return harness.table(header, lines)


def model_table(row: Mapping[str, Any]) -> str:
    """One line of the model, point by point."""
    header = ("GPUs", "images a GPU", "ms a step", "of it exposed", "images/s", "efficiency")
    points = [Point(**point) for point in row["points"]]
    lines = [
        (
            str(p.num_gpus),
            f"{p.batch_per_gpu:g}",
            harness.shown(1e3 * p.step_s, 3),
            harness.shown(1e3 * p.exposed_s, 3),
            harness.shown(p.images_per_s, 0),
            f"{100 * p.efficiency:.1f} %",
        )
        for p in points
    ]
    return harness.table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args, cfg = read_arguments(words)
        recorder = Recorder("scaling", words, None if args.no_record else args.results)
        if not args.model_only:
            measure(args, cfg, recorder)
            print(f"{recorder.rows[0]['hardware']['cpu']}, {recorder.rows[0]['hardware']['cores']} cores")
            print(measured_table(recorder.rows))
        model(args, cfg, recorder)
        for row in recorder.rows:
            if row["variant"].startswith("model"):
                cluster = row["cluster"]
                print(
                    f"\n{row['variant']}, batch {row['batch_size']}: {cluster['gpus_per_node']} GPUs a node by "
                    f"{cluster['within']['name']}, nodes by {cluster['between']['name']}, "
                    f"{100 * cluster['achieved']:g} % of either; steps from {row['step_ms_from']}; an upper bound"
                )
                print(model_table(row))

    return command.run("benchmarks.scaling", body)


if __name__ == "__main__":
    sys.exit(main())
