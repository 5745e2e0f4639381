"""Networks of two channels with their optimisers, a little training for them, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint as checkpoints
from pipeline.cli.options import to_yaml
from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig
from pipeline.models import Discriminator, Generator
from pipeline.players import Players, make_players
from pipeline.step import FastStep

NZ, WIDTH, SIDE, BATCH = 4, 2, 16, 4
CFG = Config(data=DataConfig(image_size=SIDE), model=ModelConfig(nz=NZ, ngf=WIDTH, ndf=WIDTH))
MANIFEST = {"identity": {}, "layout": {}, "begun_from": ""}


def tiny_players(
    lr: float = 2e-4,
    precision: Any = "fp32",
    seed: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: Any = "torch",
) -> Players:
    torch.manual_seed(seed)
    pair = Generator(NZ, WIDTH, 3, SIDE, SIDE), Discriminator(WIDTH, 3, SIDE, SIDE)
    for network in pair:
        network.to(memory_format=memory_format)
    return make_players(*pair, OptimConfig(backend=backend), lr=lr, precision=precision)


def train_some(players: Players, steps: int = 2, precision: Any = "fp32") -> None:
    step = FastStep(players, precision, channels_last=False, ema_half_life_images=100)
    random = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
        step(images, torch.randn(BATCH, NZ, generator=random), 1000, BATCH)


def snapshot(players: Players) -> checkpoints.State:
    return checkpoints.snapshot(players, [checkpoints.buffers_of(players)])


def write(run: Path, players: Players, images_seen: int) -> Path:
    return checkpoints.write(run, snapshot(players), to_yaml(CFG), MANIFEST | {"images_seen": images_seen})


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, all the way down."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other
