"""Datasets of torchvision as files: CelebA's JPEGs as they are, all others as PNG.

torchvision downloads and unpacks below a root folder, as its own users know it; what comes out is (key, bytes).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import ConfigError, DataConfig
from pipeline.errors import DataError, StorageError, UserError
from pipeline.index import Dataset, build_index
from pipeline.sources import open_source, shown

TRAIN_TEST = ("train", "test")
SPLITS = {
    "CelebA": ("train", "valid", "test"),
    "CIFAR10": TRAIN_TEST,
    "CIFAR100": TRAIN_TEST,
    "FakeData": ("train",),
    "FashionMNIST": TRAIN_TEST,
    "Flowers102": ("train", "val", "test"),
    "KMNIST": TRAIN_TEST,
    "MNIST": TRAIN_TEST,
    "STL10": ("train", "test", "unlabeled"),
    "SVHN": ("train", "test", "extra"),
}
"""Parts of each dataset; "all" means every one of them."""
BY_FLAG = {"CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST"}
"""Those that take train=True or False instead of a split."""
FAKE_IMAGES = 1000
FAKE_SHAPE = (3, 64, 64)  # C, H, W
CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
CELEBA_FOLDER = "img_align_celeba"


def chosen_splits(name: str, split: str | None) -> tuple[str, ...]:
    """The parts meant by --split; by default all of CelebA, the train part of others.

    Raises:
        ConfigError: no such dataset or part.
    """
    if name not in SPLITS:
        raise ConfigError(f"NAME must be one of {', '.join(SPLITS)}, got {name!r}")
    split = split or ("all" if name == "CelebA" else "train")
    if split == "all":
        return SPLITS[name]
    if split not in SPLITS[name]:
        raise ConfigError(f"--split of {name} must be one of {', '.join(SPLITS[name])}, all, got {split!r}")
    return (split,)


def png_files(
    name: str, root: Path, splits: tuple[str, ...], *, download: bool, count: int
) -> Iterator[tuple[str, bytes]]:
    """(split/000000.png, its bytes) of a dataset other than CelebA; count: of each split only so many, 0: all.

    Raises:
        UserError: a Python package that torchvision needs is missing.
        DataError: not below root, and download is not set.
        StorageError: the download fails.
    """
    datasets = import_module("torchvision.datasets")
    for split in splits:
        arguments: dict[str, Any]
        if name == "FakeData":
            arguments = {"size": count or FAKE_IMAGES, "image_size": FAKE_SHAPE}
        else:
            part = {"train": split == "train"} if name in BY_FLAG else {"split": split}
            arguments = {"root": str(root), "download": download, **part}
        make = partial(getattr(datasets, name), **arguments)
        dataset = _obtain(name, root, download, make)
        for number in range(min(len(dataset), count or len(dataset))):
            buffer = io.BytesIO()
            dataset[number][0].save(buffer, "PNG")
            yield f"{split}/{number:06d}.png", buffer.getvalue()


def celeba(root: Path, splits: tuple[str, ...], *, download: bool, count: int) -> Dataset:
    """CelebA's aligned faces from root/celeba, where torchvision keeps them, zipped or unpacked.

    All parts together need the one zip, 1.4 GB; a single part also the tables, which torchvision insists on.

    Raises:
        UserError, DataError, StorageError: as png_files.
    """
    base = root / "celeba"
    archive = base / f"{CELEBA_FOLDER}.zip"
    names: set[str] | None = None
    if splits != SPLITS["CelebA"]:
        kind = import_module("torchvision.datasets").CelebA
        part = _obtain("CelebA", root, download, partial(kind, str(root), split=splits[0], download=download))
        names = {f"{CELEBA_FOLDER}/{name}" for name in part.filename}
    elif not archive.exists() and not (base / CELEBA_FOLDER).is_dir():
        if not download:
            raise DataError(f"CelebA: neither {shown(archive)} nor the folder {CELEBA_FOLDER} beside it exists")
        datasets = import_module("torchvision.datasets")
        file_id, md5, _ = next(row for row in datasets.CelebA.file_list if row[2] == archive.name)
        fetch = datasets.utils.download_file_from_google_drive
        _obtain("CelebA", root, download, partial(fetch, file_id, str(base), archive.name, md5))
    source = open_source(str(archive if archive.exists() else base))
    dataset = Dataset(source, build_index(source, DataConfig().max_pixels))
    keys = [dataset.key(i) for i in range(len(dataset))]
    meant = np.array([key.startswith(f"{CELEBA_FOLDER}/") and (names is None or key in names) for key in keys], bool)
    if count:
        meant &= np.cumsum(meant) <= count
    return dataset.where(meant)


def _obtain(name: str, root: Path, download: bool, make: Callable[[], Any]) -> Any:
    """make(), its many ways to fail as one line each."""
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, *_drive_errors())
    try:
        return make()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: torchvision needs the Python package {error.name} for it: pip install {error.name}"
        ) from error
    except failures as error:
        cause = " ".join(str(error).split())[:300]
        if "pip install gdown" in cause:
            raise UserError(f"{name}: torchvision needs the Python package gdown for it: pip install gdown") from error
        if not download:
            raise DataError(f"{name}: is not below {shown(root)} ({cause}); --download fetches it") from error
        raise StorageError(
            f"{name}: the download failed ({cause}){_by_hand(root) if name == 'CelebA' else ''}"
        ) from error


def _by_hand(root: Path) -> str:
    return (
        "; Google Drive allows only so many downloads of this file a day, for all people together: fetch"
        f" {CELEBA_FOLDER}.zip in a browser from {CELEBA_PAGE}, and name that zip itself as data.dataroot,"
        f" or put it into {shown(root / 'celeba')} and run this again"
    )


def _drive_errors() -> tuple[type[Exception], ...]:
    """What gdown raises where the quota is used up; it is imported only where it is installed."""
    try:
        exceptions = import_module("gdown.exceptions")
    except ImportError:
        return ()
    return tuple(kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception))
