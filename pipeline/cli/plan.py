"""`launch/plan.py`: what a run will need and how long it takes, before anyone queues for it.

Steps, memory, cache and disk follow from the settings.  Hours are an estimate: from a rate that is given, measured here
(--measure) or recorded (benchmarks/results/train.jsonl, scaled by the arithmetic of an image), times the ranks, times
an efficiency that is assumed.  Every assumption stands below the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed, precision, step_graph
from pipeline.assembly import Plan, build_step, require_mode
from pipeline.cache import cache_kind
from pipeline.candidates import settle
from pipeline.choices import Choices
from pipeline.cli.command import Parser, at_least, run
from pipeline.cli.options import Options, parse
from pipeline.config import Config, ConfigError
from pipeline.decode import choose_decoder, window_shape
from pipeline.distributed import Ranks
from pipeline.environment import ROOT, hardware
from pipeline.index import Dataset, cache_folder, open_dataset
from pipeline.philox import Stream
from pipeline.sampling import latents
from pipeline.sizes import Networks, disk_of, memory_of, networks_of, num_saves

NAME = "plan.py"
RESULTS = ROOT / "benchmarks" / "results" / "train.jsonl"
MEASURE_S = 20.0
"""Seconds of steps that --measure takes, all columns together."""
WARM_UP_STEPS = step_graph.WARM_UP_STEPS + 2
EFFICIENCY = 0.9


@dataclass(frozen=True)
class Rate:
    """Images a second of one rank, for each column, and where that comes from."""

    images_per_s: list[float]
    notes: list[str]


@dataclass(frozen=True)
class Question:
    """What was asked, with every `auto` resolved as far as it can be here."""

    options: Options
    num_images: int
    dataset: Dataset | None
    ranks: list[int]
    on_gpus: bool
    arithmetic: str
    networks: Networks

    @property
    def cfg(self) -> Config:
        return self.options.config

    @property
    def shares(self) -> list[int]:
        """Images of a batch on each rank, for each column; 0 where the batch does not divide."""
        batch = self.cfg.train.batch_size
        return [0 if batch % n or batch < 2 * n else batch // n for n in self.ranks]

    @property
    def num_steps(self) -> int:
        return self.cfg.train.num_steps(self.num_images)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit code is 0 or that of a user's error."""
    return run(NAME, lambda: _plan(*_read(argv)))


def _numbers(text: str) -> list[int]:
    """1,8,64 as [1, 8, 64]."""
    return [at_least(1)(word) for word in text.split(",")]


def _above_zero(most: float = math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or math.isinf(value):
            rule = "above 0" if math.isinf(most) else f"above 0 and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return number


def _read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        NAME,
        "What a run will need: steps, memory, disk, hours. Besides these options it takes all of launch/train.py's.",
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="N,N", type=_numbers, help="a column for each number of GPUs, a rank each")
    where.add_argument("--ranks", metavar="N,N", type=_numbers, help="the same for ranks on CPUs [1, or a GPU if any]")
    add("--num-images", metavar="N", type=at_least(1), help="of a dataset that is not here, in place of data.dataroot")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--images-per-s", metavar="X", type=_above_zero(), help="of one rank")
    speed.add_argument("--measure", action="store_true", help="measure one rank on this machine, without data")
    add("--measure-s", metavar="S", type=_above_zero(), default=MEASURE_S, help="seconds of steps to measure [20]")
    add("--efficiency", metavar="E", type=_above_zero(1.0), default=EFFICIENCY,
        help="share of the added ranks' speed that is left of many; assumed [0.9]")  # fmt: skip
    add("--results", metavar="FILE", type=Path, default=RESULTS, help="recorded rows [benchmarks/results/train.jsonl]")
    return parser.parse_known_args(argv)


def _plan(args: argparse.Namespace, words: list[str]) -> None:
    question = _question(args, parse(words))
    rate = _rate(args, question) if any(question.shares) else None
    print("\n".join([*_facts(question), "", *_table(question, rate, args.efficiency), ""]))
    notes = _notes(question)
    if any(question.shares):
        notes += rate.notes if rate else _unknown(question, args.results)
    if rate and max(question.ranks) > 1:
        notes.append(f"several ranks: {args.efficiency:g} of their rates added up, an assumption (--efficiency)")
    print("\n".join(textwrap.fill(f"- {note}", 110, subsequent_indent="  ", break_on_hyphens=False) for note in notes))


def _question(args: argparse.Namespace, options: Options) -> Question:
    """
    Raises:
        ConfigError: neither images nor their number, or a setting that this machine or a GPU cannot have.
        UserError: photographs that cannot be read.
    """
    cfg = options.config
    if args.num_images is None and not cfg.data.dataroot:
        raise ConfigError("give the photographs, --data.dataroot PATH, or how many there are, --num-images N")
    here = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpus = args.gpus is not None or (args.ranks is None and here.type == "cuda")
    if args.measure and on_gpus and here.type != "cuda":
        raise ConfigError("--measure is of this machine, which has no GPU: give --ranks for CPUs, or --images-per-s")
    if args.measure:
        require_mode(cfg, here if on_gpus else torch.device("cpu"))
    ranks = args.gpus or args.ranks or [1]
    if on_gpus and here.type == "cpu":
        arithmetic = "bf16" if cfg.precision == "auto" else cfg.precision
    else:
        arithmetic = precision.resolve(cfg.precision, here if on_gpus else torch.device("cpu"))
    if cfg.distributed.sync_batchnorm and not on_gpus and max(ranks) > 1:
        raise ConfigError("distributed.sync_batchnorm must be false on CPUs, got True")
    dataset = None if args.num_images else open_dataset(cfg.data)
    num_images = len(dataset) if dataset else args.num_images
    return Question(options, num_images, dataset, ranks, on_gpus, arithmetic, networks_of(cfg))


# What is the same for every number of ranks


def _facts(question: Question) -> list[str]:
    cfg, networks, num_steps = question.cfg, question.networks, question.num_steps
    train, data, model = cfg.train, cfg.data, cfg.model
    if question.dataset:
        left_out = len(question.dataset.index.rejected)
        images = f"{question.num_images:,} images in {data.dataroot}, {left_out:,} files left out"
    else:
        images = f"{question.num_images:,} images, not looked at"
    total = num_steps * train.batch_size
    height, width = data.size
    saves = num_saves(cfg, num_steps)
    milestones = len(cfg.checkpoint.milestone_images)
    also = (f", and {milestones} milestones" if milestones else "") + (
        ", and the best" if cfg.eval.every_images else ""
    )
    return [
        f"dataset      {images}",
        f"config       {question.options.config_name}: {height} x {width} x {data.nc}, nz {model.nz}, ngf {model.ngf}, "
        f"ndf {model.ndf}, {question.arithmetic}",
        f"networks     generator {networks.generator:,} parameters, discriminator {networks.discriminator:,}; "
        f"{networks.flops / 1e6:,.1f} MFLOP an image and step",
        f"run          {num_steps:,} steps of {train.batch_size}: {total:,} images, "
        f"{total / question.num_images:,.2f} epochs; learning rate {cfg.optim.scaled_lr(train.batch_size):g}",
        f"checkpoints  {saves:,}, the newest {cfg.checkpoint.keep} stay{also}",
    ]


# A column for each number of ranks


def _table(question: Question, rate: Rate | None, efficiency: float) -> list[str]:
    unit = "GPU" if question.on_gpus else "CPU rank"
    header = ["", *(f"{n:,} {unit}{'s' * (n > 1)}" for n in question.ranks)]
    rows = [
        ["images of a batch on each rank", *(f"{share:,}" if share else "no" for share in question.shares)],
    ]
    if not all(question.shares):
        rows.append(["  nearest train.batch_size", *(_nearest(question, n) for n in question.ranks)])
    rows += [*_memory_rows(question), *_cache_rows(question), *_disk_rows(question)]
    rows += _time_rows(question, rate, efficiency)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            [cells[0].ljust(first), *(c.rjust(w) for c, w in zip(cells[1:], others, strict=True))]
        ).rstrip()

    return [line(header), "  ".join("-" * w for w in widths), *map(line, rows)]


def _nearest(question: Question, ranks: int) -> str:
    """Batch sizes next to the one asked for that so many ranks can share."""
    batch = question.cfg.train.batch_size
    if batch % ranks == 0 and batch >= 2 * ranks:
        return f"{batch:,}"
    below = batch // ranks * ranks
    return f"{2 * ranks:,}" if below < 2 * ranks else f"{below:,} or {below + ranks:,}"


def _memory_rows(question: Question) -> list[list[str]]:
    found = [memory_of(question.cfg, question.networks, question.arithmetic, share) for share in question.shares]

    def row(name: str, values: list[int]) -> list[str]:
        return [name, *(_size(v) if share else "-" for v, share in zip(values, question.shares, strict=True))]

    return [
        row("memory of a rank", [m.total for m in found]),
        row("  weights and gradients", [m.weights + m.gradients for m in found]),
        row("  Adam's moments", [m.moments for m in found]),
        row("  averaged generator", [m.average for m in found]),
        row("  activations", [m.activations for m in found]),
    ]


def _cache_rows(question: Question) -> list[list[str]]:
    kind, _why = _cache(question)
    needed = _cache_bytes(question)
    columns = len(question.ranks)
    rows = [["decoded images: data.cache", *[kind] * columns]]
    if kind != "none":
        rows.append(["  on disk and in memory of a machine", *[_size(needed)] * columns])
    if kind == "device":
        rows.append(["  in memory of each GPU, besides", *[_size(needed)] * columns])
    return rows


def _disk_rows(question: Question) -> list[list[str]]:
    found = [disk_of(question.cfg, question.networks, question.num_steps, n) for n in question.ranks]
    return [
        ["run folder at its fullest", *(_size(d.total) for d in found)],
        ["  checkpoints", *(f"{d.num_checkpoints} x {_size(d.checkpoint)}" for d in found)],
        ["  grids, in samples and TensorBoard", *(_size(d.pictures) for d in found)],
        ["  logs and report", *(_size(d.lines) for d in found)],
    ]


def _time_rows(question: Question, rate: Rate | None, efficiency: float) -> list[list[str]]:
    total = question.num_steps * question.cfg.train.batch_size
    speeds: list[float] = []
    for i, (ranks, share) in enumerate(zip(question.ranks, question.shares, strict=True)):
        one = rate.images_per_s[i] if rate and share else 0.0
        speeds.append(one * ranks * (efficiency if ranks > 1 else 1.0))
    rows = [
        ["images/s, estimated", *(f"{s:,.0f}" if s else "-" for s in speeds)],
        ["time, estimated", *(_duration(total / s) if s else "-" for s in speeds)],
    ]
    limit_s = 60 * question.cfg.train.max_minutes
    if limit_s:
        starts = (f"{math.ceil(total / s / limit_s):,}" if s else "-" for s in speeds)
        rows.append([f"  starts of train.max_minutes {question.cfg.train.max_minutes:g}", *starts])
    return rows


# The cache


def _cache_bytes(question: Question) -> int:
    return question.num_images * math.prod(window_shape(question.cfg.data))


def _cache(question: Question) -> tuple[str, str]:
    """Where decoded images will be kept, and on which condition."""
    cfg = question.cfg.data
    if cfg.cache == "device" and not question.on_gpus:
        return "host", "data.cache device on a CPU keeps the images in memory once more"
    if cfg.cache != "auto":
        return cfg.cache, ""
    if question.dataset and question.on_gpus == torch.cuda.is_available():
        device = torch.device("cuda", 0) if question.on_gpus else torch.device("cpu")
        kind, why = cache_kind(cfg, question.dataset, device, decoder=choose_decoder(cfg)[0])
        return kind, f"data.cache auto comes to {kind} on this machine: {why.rstrip('.')}"
    needed = _cache_bytes(question)
    host = f"{_size(2 * needed)} of memory available and {_size(needed + 2**30)} of disk free"
    if question.on_gpus:
        gpu = f"{_size(2 * needed)} free on each GPU (with less: host)"
        return "device", f"data.cache auto comes to device where a machine has {host} (with less: none), and {gpu}"
    return "host", f"data.cache auto comes to host where a machine has {host}, with less to none"


def _notes(question: Question) -> list[str]:
    libraries = "CUDA's libraries come" if question.on_gpus else "Python and its libraries come, about 1 GiB,"
    found = [f"memory of a rank: {libraries} on top"]
    if question.on_gpus and not torch.cuda.is_available() and question.cfg.precision == "auto":
        found.append("precision auto comes to bf16 on GPUs of compute capability 8.0 or more, before that to fp16")
    why = _cache(question)[1]
    if why:
        found.append(why)
    if 0 in question.shares:
        batch = question.cfg.train.batch_size
        found.append(f"train.batch_size {batch} cannot be shared evenly, two or more a rank, where it says no")
    return found


# The rate


def _rate(args: argparse.Namespace, question: Question) -> Rate | None:
    """Images a second of one rank; None: nothing tells."""
    if args.images_per_s:
        note = f"images/s: {args.images_per_s:g} of one rank, as given"
        return Rate([args.images_per_s] * len(question.ranks), [note])
    if args.measure:
        return measured(question, args.measure_s)
    return recorded(question, args.results)


def recorded(question: Question, path: Path) -> Rate | None:
    """The rate of the recorded row that is nearest to these settings, scaled by the arithmetic of an image.

    Raises:
        ConfigError: the file cannot be read, or holds something else than rows.
    """
    rows = []
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(line)
            if row["variant"] == "trainer" and row["device"] == ("cuda" if question.on_gpus else "cpu"):
                rows.append((_distance(row, question), number, row))
    except OSError as error:
        raise ConfigError(f"--results names no readable file: {path} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--results must be rows of benchmarks.train, got something else in {path}") from None
    if not rows:
        return None
    # Of equally near ones the newest, which stands last.
    _, number, row = min(rows, key=lambda found: (found[0], -found[1]))
    scale = _row_flops(row, question.cfg) / question.networks.flops
    return Rate([row["images_per_s"] * scale] * len(question.ranks), _row_notes(row, number, path, question, scale))


def _row_flops(row: dict[str, Any], cfg: Config) -> int:
    size = row["image_size"]
    data = dataclasses.replace(cfg.data, image_size=size, nc=3, saturation=0.0, hue=0.0)
    model = dataclasses.replace(cfg.model, nz=row["nz"], ngf=row["ngf"], ndf=row["ndf"])
    return networks_of(dataclasses.replace(cfg, data=data, model=model)).flops


def _distance(row: dict[str, Any], question: Question) -> tuple[bool, bool, float, float]:
    """How far a row is from the settings: first the precision, then a clean tree, arithmetic, images a rank."""
    flops = _row_flops(row, question.cfg)
    share = max(question.shares) or question.cfg.train.batch_size
    return (
        row["precision"] != question.arithmetic,
        bool(row["dirty"]),
        abs(math.log(flops / question.networks.flops)),
        abs(math.log(row["batch_size"] / share)),
    )


def _row_notes(row: dict[str, Any], number: int, path: Path, question: Question, scale: float) -> list[str]:
    machine = row["hardware"]
    gpu = (machine.get("gpus") or ["a GPU"])[0] if row["device"] == "cuda" else ""
    what = gpu or f"{machine['cpu']}, {row['threads']} threads"
    dirty = ", of a changed tree" if row["dirty"] else ""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    text = (
        f"images/s: an estimate from {shown}, line {number} (commit {row['commit'][:12]}{dirty}, {row['date'][:10]}): "
        f"{row['images_per_s']:,.4g} on {what}, {row['image_size']} x {row['image_size']}, ngf {row['ngf']}, "
        f"{row['precision']}, batch {row['batch_size']} on one rank"
    )
    if abs(scale - 1) > 1e-9:
        text += f"; times {scale:.3g}, since an image here takes {1 / scale:.3g} times the arithmetic"
    found = [text]
    if scale > 1.1:
        found.append("less arithmetic uses a machine less well: rather fewer images/s than that")
    if not gpu:
        found.append("each CPU rank is taken to have cores like those to itself; ranks that share them share the rate")
    if row["precision"] != question.arithmetic:
        found.append(f"no row is in {question.arithmetic}: with it the rate will be another")
    others = sorted({share for share in question.shares if share and share != row["batch_size"]}, reverse=True)
    if others:
        sizes = ", ".join(map(str, others))
        found.append(f"{sizes} images on a rank in place of {row['batch_size']}: the fewer, the slower they are")
    return found


def _unknown(question: Question, path: Path) -> list[str]:
    kind = "a GPU" if question.on_gpus else "a CPU"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    ways = "--images-per-s, or --measure on a machine that has one"
    return [f"time: {shown} has no row of {kind}; give {ways}"]


def measured(question: Question, seconds: float) -> Rate:
    """Real steps on this machine, on images that stay in memory: for each column's images of a rank."""
    device = torch.device("cuda", 0) if question.on_gpus else torch.device("cpu")
    torch.set_num_threads(distributed.num_threads(question.cfg.distributed, 1))
    shares = sorted({share for share in question.shares if share})
    rates = {share: _measured(question, share, device, seconds / len(shares)) for share in shares}
    found = hardware()
    what = found["gpus"][0] if question.on_gpus else f"{found['cpu']}, {torch.get_num_threads()} threads"
    told = ", ".join(f"{rates[share]:,.4g} at {share} images" for share in reversed(shares))
    notes = [
        f"images/s of one rank, measured now on {what}: {told}; on images in memory: decoding, checkpoints "
        "and whatever else this machine does come on top"
    ]
    if not question.on_gpus:
        notes.append("each CPU rank is taken to have these cores to itself; ranks that share them share the rate")
    return Rate([rates.get(share, 0.0) for share in question.shares], notes)


def _measured(question: Question, share: int, device: torch.device, seconds: float) -> float:
    """Images a second of steps at so many images, for about so many seconds."""
    cfg = question.cfg
    arithmetic = precision.resolve(cfg.precision, device)
    precision.apply(arithmetic, deterministic=cfg.run.deterministic)
    mode = "eager" if cfg.train.mode == "auto" else cfg.train.mode
    plan = Plan("pillow", "none", arithmetic, mode, (), question.num_steps, 0)  # decoder and cache play no part
    alone = dataclasses.replace(
        cfg,
        distributed=dataclasses.replace(cfg.distributed, sync_batchnorm=False),
        train=dataclasses.replace(cfg.train, batch_size=share),
    )
    ranks = Ranks(0, 1, 0, 1, device)
    plan = settle(alone, plan, ranks, Choices(device, cache=cache_folder(cfg.data), overrides=cfg.kernels.choices))
    step = build_step(alone, plan, ranks)
    images = torch.randint(0, 256, (share, *cfg.data.size, cfg.data.nc), dtype=torch.uint8, device=device)
    vectors = latents(cfg.run.seed, Stream.LATENT, 0, share, cfg.model.nz, device)
    steps, start = -WARM_UP_STEPS, time.perf_counter()
    while steps < 1 or time.perf_counter() - start < seconds:
        if steps == 0:
            start = time.perf_counter()
        step(images, vectors, 0, share)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps += 1
    return steps * share / (time.perf_counter() - start)


# Words


def _size(num_bytes: float) -> str:
    """Bytes for a person: three digits, MiB or GiB."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:,.{1 if num_bytes < 100 * 2**20 else 0}f} MiB"
    return f"{num_bytes / 2**30:,.{2 if num_bytes < 100 * 2**30 else 0}f} GiB"


def _duration(seconds: float) -> str:
    """Seconds for a person."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s"
