"""The body of launch/prepare.py: draw, index, check, pack and export datasets."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.cli.command import Parser, at_least, run
from pipeline.config import ConfigError, DataConfig
from pipeline.index import Dataset, build_index, check_full, index_file, leave_out, open_dataset
from pipeline.packing import check_target, pack, write_zip
from pipeline.sources import open_source, shown

NAME = "prepare.py"
NAMED = 20
"""Files left out that are named on the terminal; rejected.txt names all."""


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def body() -> None:
        arguments = _parser().parse_args(argv)
        arguments.body(arguments)

    return run(NAME, body)


class _Command(Parser):
    """Parser under the names by which argparse makes the parser of a subcommand."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description)


def _parser() -> Parser:
    parser = Parser(NAME, "Draw, index, check, pack and export datasets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what)

    faces = command("faces", "Draw a set of cartoon faces as JPEG files.")
    faces.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    faces.add_argument("--count", type=at_least(1), default=6000, help="faces to draw (default: 6000)")
    faces.add_argument("--seed", type=at_least(0), default=0, help="another seed, other faces (default: 0)")
    faces.set_defaults(body=_faces)

    index = command("index", "Read every file once, say what is there and what is wrong, and keep that for training.")
    index.add_argument("path", metavar="PATH", help="as data.dataroot: folder, .zip, tar shards, Parquet or LMDB")
    index.add_argument("--full", action="store_true", help="decode every image too; what fails is left out from now on")
    index.add_argument("--strict", action="store_true", help="fail where a file is bad instead of leaving it out")
    index.add_argument("--cache_dir", default="", help="as data.cache_dir")
    index.set_defaults(body=_index)

    packing = command("pack", "Put the good images of any dataset into one stored zip, which training reads in place.")
    packing.add_argument("folder", metavar="FOLDER", help="photographs: a folder, .zip, tar shards, Parquet or LMDB")
    packing.add_argument("out", type=Path, metavar="OUT.zip", help="file to write")
    packing.add_argument("--force", action="store_true", help="replace OUT.zip where it is there already")
    packing.set_defaults(body=_pack)

    export = command("torchvision", "Export a torchvision dataset to a stored zip.")
    export.add_argument("name", metavar="NAME", help="CelebA, CIFAR10, MNIST, ...; a wrong one lists them all")
    export.add_argument("out", type=Path, metavar="OUT.zip", help="file to write")
    export.add_argument(
        "--root", type=Path, default=Path("data"), help="where torchvision downloads to (default: data)"
    )
    export.add_argument("--split", help="train, test, ... or all (default: all of CelebA, train of others)")
    export.add_argument("--count", type=at_least(0), default=0, help="only the first so many of each split; 0: all")
    export.add_argument("--download", action=argparse.BooleanOptionalAction, default=True, help="fetch what is missing")
    export.add_argument("--force", action="store_true", help="replace OUT.zip where it is there already")
    export.set_defaults(body=_torchvision)
    return parser


def _faces(arguments: argparse.Namespace) -> None:
    from pipeline.face_set import write_faces

    write_faces(arguments.out, arguments.count, arguments.seed)
    print(f"{shown(arguments.out)}: {arguments.count} faces of seed {arguments.seed}")


def _index(arguments: argparse.Namespace) -> None:
    if not arguments.path:
        raise ConfigError("PATH must name the photographs, got ''")
    cfg = DataConfig(dataroot=arguments.path, cache_dir=arguments.cache_dir, strict=arguments.strict)
    dataset = open_dataset(cfg)
    if arguments.full:
        found = check_full(dataset)
        if found:
            leave_out(cfg, dataset, found)
            dataset = open_dataset(cfg)
    print(_summary(dataset))
    print(f"  kept in        {index_file(cfg)}")
    _name_rejected(dataset.index.rejected, f"; all in {index_file(cfg).with_name('rejected.txt')}")


def _pack(arguments: argparse.Namespace) -> None:
    check_target(arguments.out, force=arguments.force)
    source = open_source(arguments.folder)
    dataset = Dataset(source, build_index(source, DataConfig().max_pixels))
    _report_packed(arguments.out, pack(dataset, arguments.out, force=arguments.force))


def _torchvision(arguments: argparse.Namespace) -> None:
    from pipeline.torchvision_sets import celeba, chosen_splits, png_files

    splits = chosen_splits(arguments.name, arguments.split)
    check_target(arguments.out, force=arguments.force)
    root = arguments.root.expanduser()
    options = {"download": arguments.download, "count": arguments.count}
    if arguments.name == "CelebA":
        left_out = pack(celeba(root, splits, **options), arguments.out, force=arguments.force)
    else:
        write_zip(png_files(arguments.name, root, splits, **options), arguments.out, force=arguments.force)
        left_out = ()
    _report_packed(arguments.out, left_out)


def _report_packed(out: Path, left_out: Sequence[tuple[str, str]]) -> None:
    source = open_source(str(out))
    print(_summary(Dataset(source, build_index(source, DataConfig().max_pixels))))
    _name_rejected(left_out, "")


def _summary(dataset: Dataset) -> str:
    """Count, sizes, bytes, kinds and fingerprint, a line each."""
    index = dataset.index
    by_pixels = np.argsort(index.heights.astype(np.int64) * index.widths, kind="stable")
    smallest, median, largest = (dataset.size(int(by_pixels[i])) for i in (0, len(by_pixels) // 2, -1))
    sizes = np.array([dataset.source.size(item) for item in index.items.tolist()])
    endings = Counter(PurePosixPath(dataset.key(i)).suffix.lower() for i in range(len(dataset)))
    num_sizes = len(np.unique(np.stack([index.heights, index.widths]), axis=1).T)
    lines = [
        f"{shown(dataset.source.path)}: {len(dataset)} images, {len(index.rejected)} files left out",
        "  width x height "
        + ", ".join(
            f"{what} {w} x {h}"
            for what, (h, w) in zip(("smallest", "median", "largest"), (smallest, median, largest), strict=True)
        )
        + f"; {num_sizes} different",
        f"  bytes          median {int(np.median(sizes))}, largest {sizes.max()}, all {sizes.sum()}",
        "  names          " + ", ".join(f"{count} {ending}" for ending, count in endings.most_common()),
        f"  fingerprint    {index.fingerprint}",
    ]
    return "\n".join(lines)


def _name_rejected(rejected: Sequence[tuple[str, str]], where: str) -> None:
    for key, reason in rejected[:NAMED]:
        print(f"  left out: {shown(key)} {reason}")
    if len(rejected) > NAMED:
        print(f"  left out: and {len(rejected) - NAMED} more{where}")
