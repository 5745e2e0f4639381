"""`launch/evaluate.py`: a run's generator by the field's metrics, as a table and as a line of RUN/evaluations.jsonl."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint as checkpoints
from pipeline import distributed
from pipeline.cache import Cached, build_cache, cache_file
from pipeline.checkpoint import Checkpoint, chosen, open_generator
from pipeline.cli.command import Parser, at_least, device_of, run
from pipeline.config import METRICS, Config, ConfigError
from pipeline.decode import Decoder, choose_decoder
from pipeline.distributed import Ranks
from pipeline.environment import versions
from pipeline.errors import StorageError
from pipeline.index import Dataset, cache_folder, open_dataset
from pipeline.metrics.evaluation import Evaluation, one_thread
from pipeline.metrics.gathering import CHUNK
from pipeline.precision import full_float32
from pipeline.samples import Samples
from pipeline.sampling import recalibrated

NAME = "evaluate.py"
FILE = "evaluations.jsonl"
RESIZE = "linear with antialias"
PARTS = {"swd": "swd_", "ms_ssim": "ms_ssim_real", "kid": "kid_std", "inception_score": "inception_score_std"}
"""What belongs to a metric stands below it: beginnings of names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def body() -> None:
        with distributed.leaving_together():
            evaluate(distributed.together(lambda: _read(arguments)))

    return run(NAME, body)  # what every rank finds wrong is told by one of them


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        NAME,
        "How good a run's pictures are, by the field's metrics. Under torchrun all ranks share the work; "
        "the figures are the same.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of the run")
    add(
        "--checkpoint",
        metavar="WHICH",
        help="best, last, or a checkpoint's folder [best where one is marked, else last]",
    )
    add("--metrics", metavar="A,B,...", help=f"of {', '.join(METRICS)} [the run's eval.metrics]")
    # torchrun takes --num for one of its own options, even behind the script's name.
    count = "generated images, and as many real ones; under torchrun --num-images [the run's eval.num_images]"
    add("--num", "--num-images", metavar="N", type=at_least(2), help=count)
    add("--weights", choices=("ema", "live"), default="ema", help="the averaged generator or the trained one [ema]")
    add("--data", metavar="PATH", help="the photographs, where they are not at the run's data.dataroot")
    add("--inception-weights", metavar="FILE", help="Inception's weights [the run's eval.inception_weights]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, else cpu]")
    add("--batch", metavar="N", type=at_least(1), default=CHUNK, help=f"images generated at a time [{CHUNK}]")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class _Found:
    """What was measured, and on what."""

    checkpoint: Checkpoint
    cfg: Config
    dataset: Dataset
    decoder: str
    extractor: str
    metrics: dict[str, float]


def evaluate(options: argparse.Namespace) -> None:
    """Measures, prints the table and appends the line.

    Raises:
        ConfigError: an unknown metric, more images than there are, options that cannot work here.
        DataError: no photographs, or no weights of Inception, or wrong ones.
        StorageError: no such run, no checkpoint, a disk that refuses.
    """
    ranks = distributed.together(lambda: _ranks(options.device))

    def say(text: str) -> None:
        if ranks.leads:
            print(text, file=sys.stderr, flush=True)

    def choose() -> Checkpoint | None:
        if not ranks.leads:
            return None
        marked = (options.run / "checkpoints" / checkpoints.BEST).exists()
        return chosen(options.run, options.checkpoint or ("best" if marked else "last"), say)

    checkpoint = distributed.broadcast(distributed.together(choose))
    assert checkpoint is not None
    generator, cfg, _ = distributed.together(lambda: open_generator(checkpoint.folder, weights=options.weights))
    cfg = distributed.together(lambda: _settings(cfg, options))
    # This machine's share, not what the run's settings gave its training.
    threads = distributed.num_threads(Config().distributed, ranks.local_world_size)
    torch.set_num_threads(threads)
    dataset = distributed.leader_first(ranks, lambda: open_dataset(cfg.data))
    _tell_other_photographs(checkpoint, dataset, say)
    decoder, _ = distributed.together(lambda: choose_decoder(cfg.data))
    samples = Samples(dataset)
    cached = _cached(cfg, dataset, decoder, ranks, threads, samples)
    evaluation = Evaluation(
        cfg, dataset, ranks, metrics=cfg.eval.metrics, num_images=cfg.eval.num_images, decoder=decoder, cached=cached,
        samples=samples, threads=threads, say=say, batch=options.batch,
    )  # fmt: skip
    begun = time.perf_counter()
    generator.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with full_float32(), one_thread():
        twin = recalibrated(generator, cfg.model.nz)
    metrics = evaluation.measure(twin)
    found = _Found(checkpoint, cfg, dataset, evaluation.real.decoder, evaluation.extractor_name, metrics)
    if ranks.leads:
        row = _row(found, options, ranks, time.perf_counter() - begun)
        print("\n".join(table(row)))
        _append(options.run / FILE, row)


def _ranks(device: str) -> Ranks:
    """The ranks under torchrun, on the devices it gives them; else one, on the device asked for."""
    if distributed.from_environment().world_size > 1:
        if device != "auto":
            raise ConfigError(f"--device must be auto under torchrun with several ranks, got {device!r}")
        return distributed.start(Config().distributed)
    return Ranks(0, 1, 0, 1, device_of(device))


def _settings(cfg: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's settings with what the command line asks for in their place."""
    wanted: dict[str, Any] = {"every_images": 0}  # eval.best is of no account here
    if options.metrics is not None:
        wanted["metrics"] = [name.strip() for name in options.metrics.split(",") if name.strip()]
    if options.num is not None:
        wanted["num_images"] = options.num
    if options.inception_weights is not None:
        wanted["inception_weights"] = options.inception_weights
    data = dataclasses.replace(cfg.data, dataroot=options.data) if options.data else cfg.data
    return dataclasses.replace(cfg, data=data, eval=dataclasses.replace(cfg.eval, **wanted))


def _tell_other_photographs(checkpoint: Checkpoint, dataset: Dataset, say: Any) -> None:
    trained_on = str(checkpoint.manifest.get("identity", {}).get("dataset", ""))
    if trained_on and trained_on != dataset.fingerprint:
        say(
            f"{dataset.source.path} (fingerprint {dataset.fingerprint[:12]}) is not what the run was trained on "
            f"(fingerprint {trained_on[:12]}): the figures compare with other photographs"
        )


def _cached(
    cfg: Config, dataset: Dataset, decoder: Decoder, ranks: Ranks, threads: int, samples: Samples
) -> Cached | None:
    """The decoded images that a training has left, where there are any on every rank's machine."""
    folder = distributed.together(lambda: cache_folder(cfg.data))
    path = cache_file(folder, cfg.data, dataset.fingerprint, decoder, ranks.device)
    if not all(distributed.gather(path.exists())):
        return None
    return build_cache(
        cfg.data, dataset, decoder=decoder, kind="host", device=ranks.device, threads=threads,
        local_rank=ranks.local_rank, local_world_size=ranks.local_world_size, together=distributed.together,
        samples=samples,
    )  # fmt: skip


def _row(found: _Found, options: argparse.Namespace, ranks: Ranks, seconds: float) -> dict[str, Any]:
    """The line of evaluations.jsonl: the metrics, and all that makes them comparable or not."""
    cfg = found.cfg
    height, width = cfg.data.size
    weights = options.weights if options.weights == "live" or cfg.optim.ema_half_life_images else "live"
    row: dict[str, Any] = {"checkpoint": found.checkpoint.folder.name, "weights": weights}
    row |= {"images_seen": found.checkpoint.images_seen, "num_images": cfg.eval.num_images}
    row |= {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}
    row |= {
        "real": f"{cfg.eval.num_images:,} of {len(found.dataset):,} photographs, fingerprint "
        f"{found.dataset.fingerprint[:12]}",
        "crop": f"short side resized to {min(height, width) + cfg.data.crop_margin}, middle {height} x {width} cut out",
        "resize": RESIZE,
        "decoder": found.decoder,
        "extractor": found.extractor,
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "seconds": round(seconds, 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions() | _version_of("torch-fidelity", wanted=bool(found.extractor)),
    }
    return row


def _version_of(package: str, *, wanted: bool) -> dict[str, str]:
    return {package: importlib.metadata.version(package)} if wanted else {}


def table(row: dict[str, Any]) -> list[str]:
    """The figures, each with which way is better, and below what they are figures of."""
    lines = [f"{'metric':<16} {'value':>10}  better is"]
    for name, better in METRICS.items():
        if name in row:
            lines.append(f"{name:<16} {_number(row[name]):>10}  {better}")
            parts = [key for key in row if name in PARTS and key.startswith(PARTS[name])]
            lines += [f"  {part:<14} {_number(row[part]):>10}" for part in parts]
    facts = {
        "N": f"{row['num_images']:,} generated images, {row['real']}",
        "crop": row["crop"],
        "resize": row["resize"],
        "decoder": row["decoder"],
        "extractor": row["extractor"],
        "checkpoint": f"{row['checkpoint']}, {row['weights']} weights after {row['images_seen']:,} images",
        "took": f"{row['seconds']:g} s on {row['ranks']} rank(s)",
    }
    return [*lines, "", *(f"{name:<16} {value}" for name, value in facts.items() if value)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
