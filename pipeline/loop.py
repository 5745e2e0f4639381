"""The training loop: maintenance that is due, then one step; progress counted in images.

Counting images keeps what happens when the same for every batch size and number of ranks.  Checkpoints, grids and log
lines are entries of the maintenance list, so that another one touches nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.feed import Feed
from pipeline.meters import Meters
from pipeline.order import Slice
from pipeline.philox import Stream, normal
from pipeline.step import Step


@dataclass(frozen=True)
class Maintenance:
    """Something done between steps.  Every rank calls it at the same step, so it may talk to the others."""

    every_images: int
    """Due whenever images_seen passes a multiple of this; 0: only at the end."""
    action: Callable[[int], None]
    """Called with images_seen."""

    def due(self, before: int, now: int, last: bool) -> bool:
        return last or (self.every_images > 0 and now // self.every_images > before // self.every_images)


def train(
    step: Step,
    feed: Feed,
    meters: Meters,
    maintenance: list[Maintenance],
    *,
    seed: int,
    shard: Slice,
    nz: int,
    images_seen: int,
    num_steps: int,
    on_step: Callable[[int], None],
    order_offset: int = 0,
) -> int:
    """Train until num_steps steps of shard.batch_size images are done, counted from the start of the run.

    Args:
        images_seen: images of the steps already done; a multiple of the batch size unless that was changed on resume.
        on_step: called after every step with images_seen.
        order_offset: images by which the order runs ahead of images_seen, since going back took others.

    Returns:
        images_seen at the end.
    """
    total = num_steps * shard.batch_size
    while images_seen < total:
        images = feed.next()
        numbers = torch.from_numpy(shard.numbers(images_seen + order_offset)).to(images.device, non_blocking=True)
        latents = normal(seed, Stream.LATENT, numbers, nz)
        meters.add(step(images, latents, images_seen, shard.batch_size, numbers), step.skipped, step.penalty)
        before, images_seen = images_seen, images_seen + shard.batch_size
        on_step(images_seen)
        for entry in maintenance:
            if entry.due(before, images_seen, images_seen >= total):
                entry.action(images_seen)
    return images_seen
