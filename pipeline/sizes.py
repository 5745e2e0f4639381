"""How large the parts of a run are, known before anything is built: parameters, arithmetic, memory, disk.

Legend: N images of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.assembly import build_networks
from pipeline.config import Config
from pipeline.models import step_flops
from pipeline.pictures import GAP, grid_shape

FLOAT = 4
"""Bytes of a weight, a gradient and each of Adam's two moments, whatever the precision of the activations."""
_CHECKPOINT_FRAME = 20_000
"""Bytes of a checkpoint that are no tensor: their names, and the manifest (18,600 with any widths, 2026-11)."""
_LINE_BYTES = 2_000
"""Of a line of stats.jsonl and its points in TensorBoard (1,750, 2026-11)."""
_REPORT_BYTES = 5 << 20


@dataclass(frozen=True)
class Networks:
    """What the two networks of a run count."""

    generator: int
    """Parameters."""
    discriminator: int
    """Parameters."""
    statistics: int
    """BatchNorm's running means and variances, of both."""
    flops: int
    """Floating-point operations of a training step for one image."""
    outputs: int
    """Numbers that a step keeps for backward, for one image: each layer's output before and after its activation, G
    once, D twice."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds during a step, Python and libraries apart."""

    weights: int
    gradients: int
    moments: int
    average: int
    """Of G; 0 where none is kept."""
    activations: int

    @property
    def states(self) -> int:
        """All but the activations: the same for every batch size."""
        return self.weights + self.gradients + self.moments + self.average

    @property
    def total(self) -> int:
        return self.states + self.activations


def networks_of(cfg: Config) -> Networks:
    """Counts of the networks that these settings make."""
    generator, discriminator = build_networks(cfg, torch.device("meta"))
    g, d = (sum(p.numel() for p in n.parameters()) for n in (generator, discriminator))
    statistics = sum(b.numel() for n in (generator, discriminator) for b in n.buffers() if b.is_floating_point())
    height, width = cfg.data.size
    flops = step_flops(generator, discriminator, height, width)
    latents = torch.empty(1, cfg.model.nz, device="meta")
    images = torch.empty(1, cfg.data.nc, height, width, device="meta")
    outputs = _outputs(generator, latents) + 2 * _outputs(discriminator, images)
    return Networks(g, d, statistics, flops, outputs)


def _outputs(network: nn.Module, example: torch.Tensor) -> int:
    """Numbers that the layers of a network put out for one example."""
    total = 0

    def count(_module: object, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel()

    for layer in network.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(count)
    network(example)
    return total


def memory_of(cfg: Config, networks: Networks, precision: str, per_rank: int) -> Memory:
    """About what a rank holds at N = per_rank, or the part of them that train.micro_batch takes at a time."""
    if cfg.train.micro_batch:
        per_rank = min(per_rank, cfg.train.micro_batch)
    both = FLOAT * (networks.generator + networks.discriminator)
    average = FLOAT * networks.generator if cfg.optim.ema_half_life_images else 0
    width = FLOAT if precision in ("fp32", "tf32") else 2
    return Memory(both, both, 2 * both, average, per_rank * width * networks.outputs)


def checkpoint_bytes(cfg: Config, networks: Networks, world_size: int) -> int:
    """Of one checkpoint: weights, moments, the average, and every rank's BatchNorm statistics."""
    memory = memory_of(cfg, networks, "fp32", 0)
    statistics = FLOAT * networks.statistics * (1 + world_size)
    return memory.weights + memory.moments + memory.average + statistics + _CHECKPOINT_FRAME


def num_due(every_images: int, cfg: Config, num_steps: int) -> int:
    """How often something happens in a whole run that is due every so many images, and at the end."""
    total, batch = num_steps * cfg.train.batch_size, cfg.train.batch_size
    if every_images == 0:
        return 1
    if every_images < batch:
        return num_steps
    at_the_end = total // every_images > (total - batch) // every_images
    return total // every_images + (not at_the_end)


def num_saves(cfg: Config, num_steps: int) -> int:
    """Checkpoints that a whole run writes: those that are due, and one before each evaluation."""
    total, batch = num_steps * cfg.train.batch_size, cfg.train.batch_size
    steps = {num_steps}
    for every_images in (cfg.checkpoint.every_images, cfg.eval.every_images):
        if every_images:
            steps |= {-(-passed // batch) for passed in range(every_images, total + 1, every_images)}
    return len(steps)


@dataclass(frozen=True)
class Disk:
    """Bytes of a run folder at its fullest."""

    checkpoint: int
    """One of them."""
    num_checkpoints: int
    """That lie there at a time: those that stay, and the one being written."""
    pictures: int
    """Grids in samples/ and once more in TensorBoard, at the size of their pixels; PNG takes less."""
    lines: int
    """stats.jsonl and TensorBoard's curves, and report.html."""

    @property
    def total(self) -> int:
        return self.checkpoint * self.num_checkpoints + self.pictures + self.lines


def disk_of(cfg: Config, networks: Networks, num_steps: int, world_size: int) -> Disk:
    """What the run folder of a whole run needs."""
    written = num_saves(cfg, num_steps)
    best = cfg.eval.every_images > 0  # may be an older one than those that stay anyway
    stays = min(written, cfg.checkpoint.keep + len(cfg.checkpoint.milestone_images) + best)
    rows, columns = grid_shape(cfg.log.grid_size)
    height, width = cfg.data.size
    grid = rows * (height + GAP) * columns * (width + GAP) * cfg.data.nc
    grids = num_due(cfg.log.grid_every_images, cfg, num_steps) + 2  # before the first step, and the real ones
    lines = _LINE_BYTES * num_due(cfg.log.every_steps * cfg.train.batch_size, cfg, num_steps)
    report = _REPORT_BYTES if cfg.log.report else 0
    checkpoint = checkpoint_bytes(cfg, networks, world_size)
    return Disk(checkpoint, min(stays + 1, written), 2 * grids * grid, lines + report)
