"""Does the fast way of training learn what the plain one learns?  `python -m benchmarks.quality`.

    python -m benchmarks.quality tutorial --data P --images 40000 --seed 1 --out DIR
        trains the plain tutorial loop (benchmarks/plain_loop.py: float32, contiguous, Pillow) and keeps its generator
        as DIR/generator.pt; the other arm is launch/train.py itself.
    python -m benchmarks.quality measure --data P ARM=PATH [ARM=PATH ...]
        measures each generator: of a file that `tutorial` wrote, or of a run folder, a checkpoint or `RUN@best`.  One
        result line for each path; the table gives each arm's mean over its paths (seeds) and their standard deviation.

Both arms are measured the same way: the generator as trained, not its average (--weights ema for a run's average),
BatchNorm statistics recalibrated for its weights, --num images, against as many photographs with the training crop.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Recorder, say
from benchmarks.plain_loop import CHANNELS, PlainLoop
from benchmarks.train import files_of
from pipeline import checkpoint as checkpoints
from pipeline.cli import command
from pipeline.config import Config, ConfigError, DataConfig, EvalConfig, ModelConfig
from pipeline.decode import choose_decoder
from pipeline.distributed import Ranks
from pipeline.errors import StorageError
from pipeline.index import Dataset, open_dataset
from pipeline.metrics.evaluation import Evaluation
from pipeline.models import Generator
from pipeline.sampling import recalibrated

BLOCK = 20
"""Steps between lines of progress."""


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.quality", __doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("action", choices=("tutorial", "measure"))
    parser.add_argument("arms", nargs="*", metavar="ARM=PATH", help="with measure: generators by the arm's name")
    harness.add_options(parser)
    parser.add_argument("--images", type=command.at_least(1), default=40_000, help="images to train on [40000]")
    parser.add_argument("--batch", type=command.at_least(2), default=128, help="images a step [128]")
    parser.add_argument("--ngf", type=command.at_least(1), default=64, help="channels of both networks [64]")
    parser.add_argument("--size", type=command.at_least(8), default=64, help="pixels [64]")
    parser.add_argument("--seed", type=command.at_least(0), default=1, help="[1]")
    parser.add_argument("--out", type=Path, help="folder of the trained generator")
    parser.add_argument("--threads", type=command.at_least(1), help="for arithmetic [torch's choice]")
    parser.add_argument("--num", type=command.at_least(2), default=5000, help="images to measure with [5000]")
    parser.add_argument("--weights", choices=("live", "ema"), default="live", help="of a run's generator [live]")
    args = parser.parse_intermixed_args(argv)
    if args.action == "tutorial" and (args.out is None or args.arms):
        raise ConfigError("tutorial takes --out and no ARM=PATH")
    if args.action == "measure" and (not args.arms or not all("=" in arm for arm in args.arms)):
        raise ConfigError(f"measure takes ARM=PATH, got {args.arms}")
    return args


def data_config(args: argparse.Namespace) -> DataConfig:
    """Photographs as the tutorial crops them."""
    cfg = DataConfig(image_size=args.size, nc=CHANNELS)
    return DataConfig(image_size=args.size, nc=CHANNELS, dataroot=harness.photographs(args.data, cfg))


def train_tutorial(args: argparse.Namespace, device: torch.device) -> None:
    """The plain loop for ceil(images / batch) steps, then its generator to a file.

    Raises:
        StorageError: the file cannot be written.
    """
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    paths = files_of(open_dataset(data_config(args)), args.out / "photographs")
    loop = PlainLoop(paths, size=args.size, batch_size=args.batch, ngf=args.ngf, ndf=args.ngf, device=device)
    steps, done = -(-args.images // args.batch), 0
    while done < steps:
        block = min(BLOCK, steps - done)
        seconds = loop.run(block)
        done += block
        say(
            f"{done * args.batch:8d} images  Loss_D {loop.losses_d[-1]:.3f}  Loss_G {loop.losses_g[-1]:.3f}  "
            f"{block * args.batch / seconds:.0f} images/s"
        )
    loop.close()
    state = {f"layers.{name}": value.cpu() for name, value in loop.generator.state_dict().items()}
    target = args.out / "generator.pt"
    try:
        torch.save({"generator": state, "images_seen": steps * args.batch, "seed": args.seed, "ngf": args.ngf}, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise StorageError(f"cannot write {target}: {error}") from error
    print(target)


def open_any(path: str, args: argparse.Namespace) -> tuple[Generator, dict[str, Any]]:
    """A generator and what is known of its training.

    Raises:
        StorageError: there is none at this path.
    """
    if path.endswith(".pt"):
        found = torch.load(path, weights_only=True)
        generator = Generator(ModelConfig().nz, found["ngf"], CHANNELS, args.size, args.size)
        generator.load_state_dict(found["generator"])
        facts = {key: found[key] for key in ("images_seen", "seed", "ngf")}
        return generator, facts | {"precision": "fp32", "weights": "live"}
    folder, _, which = path.partition("@")
    chosen = checkpoints.chosen(Path(folder), which or "last")
    generator, cfg, images_seen = checkpoints.open_generator(chosen.folder, weights=args.weights)
    return generator, {
        "images_seen": images_seen,
        "seed": cfg.run.seed,
        "ngf": cfg.model.ngf,
        "batch_size": cfg.train.batch_size,
        "precision": chosen.manifest["layout"]["precision"],
        "weights": args.weights,
    }


def measure(args: argparse.Namespace, argv: Sequence[str], device: torch.device) -> None:
    """Measure all generators, one result line each, and print the arms' table."""
    cfg = Config(data=data_config(args), model=ModelConfig(), eval=EvalConfig(num_images=args.num))
    dataset: Dataset = open_dataset(cfg.data)
    ranks = Ranks(0, 1, 0, 1, device)
    decoder, _ = choose_decoder(cfg.data)
    evaluation = Evaluation(
        cfg, dataset, ranks, metrics=["swd", "ms_ssim"], num_images=args.num, decoder=decoder, cached=None, say=say
    )
    recorder = Recorder("quality", argv, None if args.no_record else args.results)
    arms: dict[str, list[dict[str, Any]]] = {}
    for text in args.arms:
        arm, _, path = text.partition("=")
        generator, facts = open_any(path, args)
        figures = evaluation.measure(recalibrated(generator.to(device), cfg.model.nz))
        row = recorder.note(variant=arm, num_images=args.num, data=Path(args.data).name, **facts, **figures)
        arms.setdefault(arm, []).append(row)
        say(f"{arm}  {path}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    names = [name for name in next(iter(arms.values()))[0] if name.startswith(("swd", "ms_ssim"))]
    lines = []
    for arm, rows in arms.items():
        cells = []
        for name in names:
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        lines.append([arm, str(len(rows)), *cells])
    print(harness.table(["arm", "seeds", *names], lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Train or measure; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args = read_arguments(words)
        device = harness.choose_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.action == "tutorial":
            train_tutorial(args, device)
        else:
            measure(args, words, device)

    return command.run("benchmarks.quality", body)


if __name__ == "__main__":
    sys.exit(main())
