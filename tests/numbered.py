"""A dataset whose images say which they are, and a record of the ones that reached each step of a training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from pipeline.step import Step

SIDE, LEVEL = 16, 20
TINY = {
    "data.image_size": SIDE,
    "data.decoder": "pillow",
    "data.cache": "none",
    "data.workers": 1,
    "model.nz": 4,
    "model.ngf": 2,
    "model.ndf": 2,
    "train.batch_size": 4,
    "train.num_epochs": 1000,
    "precision": "fp32",
    "log.every_steps": 1,
    "log.grid_every_images": 0,
    "log.grid_size": 4,
    "log.report": "false",
    "distributed.threads": 1,
    "watch.slow_rank_ratio": 0,
}
"""Settings of the smallest training that has everything in it."""


def write_numbered(folder: Path, num_images: int) -> Path:
    """PNG files of one gray each, LEVEL apart from image to image; 13 at most."""
    assert LEVEL * (num_images - 1) < 256
    folder.mkdir()
    for i in range(num_images):
        Image.new("RGB", (SIDE, SIDE), (LEVEL * i,) * 3).save(folder / f"{i:03d}.png")
    return folder


def words(dataroot: Path, run: Path, **settings: Any) -> list[str]:
    """The command's options for a run on a dataset, TINY but for these settings; a section's dot is written __."""
    places = {"data.dataroot": dataroot, "data.cache_dir": f"{dataroot}-cache", "run.dir": run}
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return [word for key, value in (TINY | places | changed).items() for word in (f"--{key}", str(value))]


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[None]:
    """While entered, every step of this process adds a line to the file: images seen before, items, latents."""
    original = Step.__call__

    def call(
        self: Step, images: torch.Tensor, latents: torch.Tensor, images_seen: int, batch_size: int, *numbers: Any
    ) -> Any:
        items = (images[:, 0, 0, 0] // LEVEL).tolist()
        line = {"seen": images_seen, "items": items, "latents": latents.double().sum(1).tolist()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return original(self, images, latents, images_seen, batch_size, *numbers)

    with mock.patch.object(Step, "__call__", call):
        yield


def record_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
