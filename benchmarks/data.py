"""How fast photographs become batches: `python -m benchmarks.data`.

What the result lines claim, by variant:
    folder-dali, zip-pillow, ...   the trainer's feed without a cache, for each source (folder, zip: stored members,
                                   zip-deflated, tar) and each decoder, on the same photographs.
    plain-dali      the peer of DALI: fn.readers.file -> decoders.image -> resize -> crop on the folder, nothing else.
    plain-pillow    the peer of Pillow and the tutorial's way: open, convert, torchvision's Resize and CenterCrop.
    cache-host      the trainer's feed out of the host cache; cache-host-flip: with data.flip.
    cache-device    out of the GPU's memory; cache-device-flip likewise.  Only with a GPU.
`images_per_s` counts by the clock, with one decode thread; beside it the feed's own thread prepares and hands over.
`images_per_cpu_s` counts by the processor time of all threads together: the rate of one core.  `ratio_to_tutorial` is
images_per_s over that of plain-pillow in the same round, `ratio_per_core` the same of images_per_cpu_s.
How: each variant is opened, drained until it runs steadily, timed for --seconds and closed, so that none works in
another's time; in turns, --repeats rounds, the order reversed every other round; medians, and of the ratios the 95 %
bootstrap interval.  All files are in the system's file cache: the disk is not what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks import harness
from benchmarks.harness import Recorder, say
from pipeline.cache import Kind, build_cache
from pipeline.cli import command
from pipeline.config import DataConfig
from pipeline.decode import Decoder, choose_decoder, dali_problem
from pipeline.feed import open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.order import Slice
from pipeline.packing import write_zip

MAX_IMAGES = 2_000
SEED = 0
PEER = "plain-pillow"

Supply = contextlib.AbstractContextManager[Callable[[], object]]
"""Entered, it gives a function that makes the next batch; left, it ends its threads."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way from photographs to batches."""

    name: str
    open: Callable[[], Supply]
    facts: dict[str, Any]


def write_containers(dataset: Dataset, folder: Path) -> dict[str, Path]:
    """The first MAX_IMAGES images of a dataset as a folder, a stored zip, a deflated zip and a tar: paths by kind."""
    count = min(len(dataset), MAX_IMAGES)
    files = [(f"{i:06d}{Path(dataset.key(i)).suffix}", dataset.read(i).tobytes()) for i in range(count)]
    paths = {
        "folder": folder / "folder",
        "zip": folder / "stored.zip",
        "zip-deflated": folder / "deflated.zip",
        "tar": folder / "shard.tar",
    }
    paths["folder"].mkdir()
    for name, content in files:
        (paths["folder"] / name).write_bytes(content)
    write_zip(files, paths["zip"])
    with zipfile.ZipFile(paths["zip-deflated"], "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    with tarfile.open(paths["tar"], "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return paths


@contextlib.contextmanager
def our_feed(
    cfg: DataConfig, dataset: Dataset, device: torch.device, batch: int, threads: int, cache: Kind | None
) -> Iterator[Callable[[], object]]:
    """Batches of the trainer's feed; with a cache, one that is built already or is now."""
    decoder = choose_decoder(cfg)[0]
    cached = cache and build_cache(cfg, dataset, decoder=decoder, kind=cache, device=device, threads=threads)
    feed = open_feed(
        cfg,
        dataset,
        seed=SEED,
        shard=Slice(batch),
        device=device,
        images_seen=0,
        threads=threads,
        decoder=decoder,
        cached=cached or None,
    )
    try:
        yield feed.next
    finally:
        feed.close()


@contextlib.contextmanager
def plain_dali(
    paths: Sequence[Path], size: tuple[int, int], device: torch.device, batch: int, threads: int
) -> Iterator[Callable[[], object]]:
    """Batches of the shortest DALI pipeline that does the job."""
    from nvidia.dali import fn as dali_fn
    from nvidia.dali import pipeline_def as dali_pipeline_def

    fn: Any = dali_fn  # the stubs cover neither these modules, which fill at run time, nor device_id=None
    pipeline_def: Any = dali_pipeline_def
    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=(device.index or 0) if on_gpu else None)
    def graph() -> Any:
        files, _ = fn.readers.file(files=[str(p) for p in paths], random_shuffle=True, seed=SEED)
        images = fn.decoders.image(files, device="mixed" if on_gpu else "cpu")
        images = fn.resize(images, resize_shorter=min(size))
        return fn.crop(images, crop=size)

    built = graph()
    built.build()
    yield lambda: built.run()[0].as_tensor()


@contextlib.contextmanager
def plain_pillow(paths: Sequence[Path], size: tuple[int, int], batch: int) -> Iterator[Callable[[], object]]:
    """Batches as the tutorial's Dataset makes them, as uint8 and without workers."""
    cut = transforms.Compose([transforms.Resize(min(size)), transforms.CenterCrop(size)])

    def pictures() -> Iterator[np.ndarray]:
        random = np.random.default_rng(SEED)
        while True:
            for i in random.permutation(len(paths)).tolist():
                with Image.open(paths[i]) as image:
                    yield np.asarray(cut(image.convert("RGB")))

    endless = pictures()
    yield lambda: np.stack([next(endless) for _ in range(batch)])


def all_variants(
    cfg: DataConfig, containers: dict[str, Path], device: torch.device, batch: int, threads: int
) -> list[Variant]:
    """What can be measured here."""
    paths = sorted(containers["folder"].iterdir())
    decoders: list[Decoder] = ["pillow"] if dali_problem() else ["dali", "pillow"]
    if dali_problem():
        say(f"without DALI: {dali_problem()}")

    def ours(name: str, own: DataConfig, source: str, cache: Kind | None) -> Variant:
        own = dataclasses.replace(own, dataroot=str(containers[source]), cache=cache or "none")
        dataset = open_dataset(own)
        facts = {"source": source, "decoder": choose_decoder(own)[0], "cache": cache or "none", "flip": own.flip}
        return Variant(name, lambda: our_feed(own, dataset, device, batch, threads, cache), facts)

    plain = {"source": "folder", "cache": "none", "flip": False}
    found = [Variant(PEER, lambda: plain_pillow(paths, cfg.size, batch), plain | {"decoder": "pillow"})]
    if "dali" in decoders:
        open_dali = lambda: plain_dali(paths, cfg.size, device, batch, threads)  # noqa: E731
        found.append(Variant("plain-dali", open_dali, plain | {"decoder": "dali"}))
    for decoder in decoders:
        own = dataclasses.replace(cfg, decoder=decoder)
        found += [ours(f"{source}-{decoder}", own, source, None) for source in containers]
    kinds: list[Kind] = ["host", "device"] if device.type == "cuda" else ["host"]
    for kind in kinds:
        found.append(ours(f"cache-{kind}", cfg, "folder", kind))
        found.append(ours(f"cache-{kind}-flip", dataclasses.replace(cfg, flip=True), "folder", kind))
    return found


def timed(supply: Supply, batch: int, seconds: float, drained: int, device: torch.device) -> tuple[float, float]:
    """Open it, drain it, time it, close it.

    Args:
        drained: batches taken first: more than are ever made ahead, so that none of these is counted.

    Returns:
        Images per second and per second of processor time.
    """
    with supply as make:
        for _ in range(drained):
            make()
        harness.wait_for(device)
        batches, start, cpu_start = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            make()
            batches += 1
        harness.wait_for(device)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return batches * batch / wall, batches * batch / max(cpu, 1e-9)


def measure(args: argparse.Namespace, recorder: Recorder) -> None:
    """Time all variants in turns and record a line of each."""
    device = harness.choose_device(args.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as name:
        folder = Path(name)
        given = DataConfig(dataroot=harness.photographs(args.data, DataConfig()), cache_dir=str(folder / "cache"))
        containers = write_containers(open_dataset(given), folder)
        cfg = dataclasses.replace(given, image_size=args.size)
        variants = {v.name: v for v in all_variants(cfg, containers, device, args.batch, args.threads)}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        drained = cfg.prefetch + 3
        for i, variant in harness.turns(list(variants), args.repeats):
            found = timed(variants[variant].open(), args.batch, args.seconds, drained, device)
            rates[variant].append(found)
            say(f"round {i + 1}/{args.repeats}  {variant:<20} {found[0]:10,.0f} images/s  {found[1]:10,.0f} per CPU s")
        common = photograph_facts(open_dataset(dataclasses.replace(cfg, dataroot=str(containers["folder"]))))
        common |= {"data": Path(given.dataroot).name, "batch_size": args.batch, "image_size": args.size}
        common |= {"threads": args.threads, "device": device.type, "pairs": args.repeats, "seconds": args.seconds}
        wall, cpu = ({name: [pair[k] for pair in pairs] for name, pairs in rates.items()} for k in (0, 1))
        for name, variant_ in variants.items():
            per_core = harness.estimate(harness.ratios(cpu[name], cpu[PEER]))
            recorder.add(
                name,
                wall[name],
                harness.ratios(wall[name], wall[PEER]),
                images_per_cpu_s=float(np.median(cpu[name])),
                images_per_cpu_s_quartiles=harness.quartiles(cpu[name]),
                ratio_per_core=per_core.median,
                ratio_per_core_interval=[per_core.low, per_core.high],
                **variant_.facts,
                **common,
            )


def photograph_facts(dataset: Dataset) -> dict[str, Any]:
    """What makes photographs quick or slow to decode."""
    sizes = [dataset.read(i).size for i in range(len(dataset))]
    height, width = (int(np.median(side)) for side in (dataset.index.heights, dataset.index.widths))
    return {
        "num_images": len(dataset),
        "median_height": height,
        "median_width": width,
        "mean_file_kb": float(np.mean(sizes)) / 1000,
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The result lines as a table."""
    header = ("variant", "images/s", "quartiles", "a CPU second", "quartiles", "to plain-pillow", "the same a core")
    lines = [
        (
            row["variant"],
            harness.shown(row["images_per_s"], 0),
            " to ".join(harness.shown(q, 0) for q in row["images_per_s_quartiles"]),
            harness.shown(row["images_per_cpu_s"], 0),
            " to ".join(harness.shown(q, 0) for q in row["images_per_cpu_s_quartiles"]),
            harness.shown_ratio(row, "ratio_to_tutorial", "ratio_interval"),
            harness.shown_ratio(row, "ratio_per_core", "ratio_per_core_interval"),
        )
        for row in rows
    ]
    return harness.table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        parser = command.Parser("benchmarks.data", __doc__.splitlines()[0] if __doc__ else "")
        harness.add_options(parser)
        parser.add_argument("--seconds", type=harness.positive, default=3.0, help="of each timing")
        parser.add_argument("--repeats", type=command.at_least(1), default=5, help="timings of each variant")
        parser.add_argument("--batch", type=command.at_least(1), default=128, help="images a batch")
        parser.add_argument("--size", type=command.at_least(8), default=64, help="pixels of an image's side")
        parser.add_argument(
            "--threads", type=command.at_least(1), default=1, help="decode threads, except plain-pillow"
        )
        args = parser.parse_args(words)
        recorder = Recorder("data", words, None if args.no_record else args.results)
        measure(args, recorder)
        first = recorder.rows[0]
        print(
            f"{first['num_images']} images of {first['data']}, median {first['median_width']} x "
            f"{first['median_height']} pixels, {first['mean_file_kb']:.1f} kB; to {args.size} x {args.size}, batch "
            f"{args.batch}, {args.threads} decode thread(s), {first['hardware']['cpu']}, device {first['device']}; "
            f"{args.repeats} rounds of {args.seconds:g} s; medians [95 % interval]"
        )
        print(summary(recorder.rows))

    return command.run("benchmarks.data", body)


if __name__ == "__main__":
    sys.exit(main())
