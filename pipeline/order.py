"""Which images are in which batch: a pure function of (seed, images seen).

Image number n, counted from the start of the run, is item n % len of the permutation of epoch n // len.  A step takes
the next batch_size numbers and each global rank its slice of them; a batch may span two epochs, so every batch is
full.  Resuming is one integer, and any number of ranks sees the same images at every step.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from pipeline.philox import Stream, words


class Order:
    """The endless walk through a dataset of num_images, in a fresh permutation each epoch."""

    def __init__(self, seed: int, num_images: int) -> None:
        assert num_images >= 1
        self.seed = seed
        self.num_images = num_images
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_images,) int64: the items of this epoch in order; sorted by 64 random bits, ties by item."""
        if epoch not in self._epochs:
            items = np.arange(self.num_images, dtype=np.int64)
            # The epoch is the lane, so image numbers of one epoch never meet those of another.
            bits = words(self.seed, Stream.ORDER, items, lane=epoch).astype(np.uint64)
            self._epochs[epoch] = np.argsort(bits[:, 0] << np.uint64(32) | bits[:, 1], kind="stable")
            while len(self._epochs) > 2:  # ascending numbers never come back to one before
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def items(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) int64: the dataset item of each image number; numbers ascending."""
        epochs, places = np.divmod(numbers, self.num_images)
        items = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = self.permutation(int(epoch))[places[chosen]]
        return items


@dataclass(frozen=True)
class Slice:
    """The part of every global batch that one rank takes."""

    batch_size: int
    """Images of the global batch."""
    rank: int = 0
    """Global rank: sharding by the local one would train every node on the same images."""
    world_size: int = 1

    @property
    def per_rank(self) -> int:
        return self.batch_size // self.world_size

    def numbers(self, images_seen: int) -> np.ndarray:
        """(per_rank,) int64: the image numbers of this rank in the step that begins after images_seen images."""
        start = images_seen + self.rank * self.per_rank
        return np.arange(start, start + self.per_rank, dtype=np.int64)
