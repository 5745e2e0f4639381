"""How fast photographs become batches: `python -m benchmarks.data`.

What the result lines claim, by variant:
    folder-dali, zip-pillow, ...   the trainer's feed without a cache, for each source (folder, zip: stored members,
                                   zip-deflated, tar) and each decoder, on the same photographs.
    plain-dali      the peer of DALI: fn.readers.file -> decoders.image -> resize -> crop on the folder, nothing else.
    plain-pillow    the peer of Pillow and the tutorial's way: open, convert, torchvision's Resize and CenterCrop.
    cache-host      the trainer's feed out of the host cache; cache-host-flip: with data.flip.
    cache-device    out of the GPU's memory; cache-device-flip likewise.  Only with a GPU.
    cache-host-bf16, cache-host-bf16-flip, cache-device-bf16, ...   the same as networks read them: in [-1, 1], bf16,
                    channels-last, by one kernel on all cores or the GPU; where there is such a kernel.
With --tune, one line instead: the decoder's settings that are best here, found by a small search (tune.py).
`images_per_s` counts by the clock, with one decode thread; beside it the feed's own thread prepares and hands over.
`images_per_cpu_s` counts by the processor time of all threads together: the rate of one core.  `ratio_to_tutorial` is
images_per_s over that of plain-pillow in the same round, `ratio_per_core` the same of images_per_cpu_s.
How: each variant is opened, drained until it runs steadily, timed for --seconds and closed, so that none works in
another's time; in turns, --repeats rounds, the order reversed every other round; medians, and of the ratios the 95 %
bootstrap interval.  All files are in the system's file cache: the disk is not what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Recorder, say
from benchmarks.supplies import Supply, our_feed, plain_dali, plain_pillow, timed
from benchmarks.tune import tune
from kernels import native
from pipeline.cache import Kind
from pipeline.cli import command
from pipeline.config import DataConfig
from pipeline.decode import Decoder, choose_decoder, dali_problem
from pipeline.feed import can_normalise
from pipeline.index import Dataset, open_dataset
from pipeline.packing import write_zip

MAX_IMAGES = 2_000
PEER = "plain-pillow"


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


def all_variants(
    cfg: DataConfig, containers: dict[str, Path], device: torch.device, batch: int, threads: int
) -> list[Variant]:
    """What can be measured here."""
    paths = sorted(containers["folder"].iterdir())
    decoders: list[Decoder] = ["pillow"] if dali_problem() else ["dali", "pillow"]
    if dali_problem():
        say(f"without DALI: {dali_problem()}")

    def ours(
        name: str, own: DataConfig, source: str, cache: Kind | None, normalised: torch.dtype | None = None
    ) -> Variant:
        own = dataclasses.replace(own, dataroot=str(containers[source]), cache=cache or "none")
        dataset = open_dataset(own)
        facts = {"source": source, "decoder": choose_decoder(own)[0], "cache": cache or "none", "flip": own.flip}
        facts |= {"dtype": str(normalised or torch.uint8).removeprefix("torch.")}
        facts |= {"kernel_threads": torch.get_num_threads() if normalised else None}
        return Variant(name, lambda: our_feed(own, dataset, device, batch, threads, cache, normalised), facts)

    plain = {"source": "folder", "cache": "none", "flip": False, "dtype": "uint8", "kernel_threads": None}
    found = [Variant(PEER, lambda: plain_pillow(paths, cfg.size, batch), plain | {"decoder": "pillow"})]
    if "dali" in decoders:
        open_dali = lambda: plain_dali(paths, cfg.size, device, batch, threads)  # noqa: E731
        found.append(Variant("plain-dali", open_dali, plain | {"decoder": "dali"}))
    for decoder in decoders:
        own = dataclasses.replace(cfg, decoder=decoder)
        found += [ours(f"{source}-{decoder}", own, source, None) for source in containers]
    try:
        native.load()
    except native.NativeError as error:
        say(f"without the C kernels: {error}")
    kinds: list[Kind] = ["host", "device"] if device.type == "cuda" else ["host"]
    for kind, flip in itertools.product(kinds, (False, True)):
        own, ending = dataclasses.replace(cfg, flip=flip), "-flip" * flip
        found.append(ours(f"cache-{kind}{ending}", own, "folder", kind))
        if can_normalise(own, device, cache=kind, channels_last=True):
            found.append(ours(f"cache-{kind}-bf16{ending}", own, "folder", kind, torch.bfloat16))
    return found


def measure(args: argparse.Namespace, recorder: Recorder) -> None:
    """Time all variants in turns and record a line of each."""
    device = harness.choose_device(args.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as name:
        folder = Path(name)
        given = DataConfig(dataroot=harness.photographs(args.data, DataConfig()), cache_dir=str(folder / "cache"))
        containers = write_containers(open_dataset(given), folder)
        cfg = dataclasses.replace(given, image_size=args.size)
        if args.tune:
            own = dataclasses.replace(cfg, dataroot=str(containers["folder"]))
            print(tune(args, own, open_dataset(own), device, recorder))
            return
        found_variants = all_variants(cfg, containers, device, args.batch, args.threads)
        wanted = [v for v in found_variants if v.name == PEER or any(fnmatch(v.name, p) for p in args.only)]
        variants = {v.name: v for v in wanted}
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


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: one line.
    """
    parser = command.Parser("benchmarks.data", __doc__.splitlines()[0] if __doc__ else "")
    harness.add_options(parser)
    parser.add_argument("--seconds", type=harness.positive, default=3.0, help="of each timing")
    parser.add_argument("--repeats", type=command.at_least(1), default=5, help="timings of each variant")
    parser.add_argument("--batch", type=command.at_least(1), default=128, help="images a batch")
    parser.add_argument("--size", type=command.at_least(8), default=64, help="pixels of an image's side")
    parser.add_argument("--threads", type=command.at_least(1), default=1, help="decode threads, except plain-pillow")
    parser.add_argument("--only", type=harness.names, default=["*"], help=f"patterns of variants, beside {PEER}")
    parser.add_argument("--tune", action="store_true", help="search for the decoder's best settings instead")
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; the exit code is 0 or that of a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        args = read_arguments(words)
        recorder = Recorder("data", words, None if args.no_record else args.results)
        measure(args, recorder)
        if args.tune:
            return
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
