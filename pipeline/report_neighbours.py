"""Does the generator know photographs by heart?  Samples beside the training photographs that are nearest to them.

Pictures are compared small: averaged down to 16 to 31 pixels a side, so that a shift by a pixel or some noise hides no
copy.  Their distance is the root mean square difference of those pixels, in levels of 255.  What a distance means is
told by the photographs themselves: how far each of some lies from the nearest other one.

Legend: N images, C channels, H x W pixels, Q pictures to be looked up, D numbers that describe a picture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.cache import build_cache, cache_file
from pipeline.config import DataConfig
from pipeline.decode import Pixels, choose_decoder, middle, window_shape
from pipeline.decode.pillow import PillowDecoder
from pipeline.index import Dataset, cache_folder, open_dataset
from pipeline.report_charts import evenly

SMALL_SIDE = 16
"""Pixels that the shorter side keeps at least, where the picture has them."""
NEAREST = 3
"""Photographs shown beside a sample."""
YARDSTICKS = 256
"""Photographs whose nearest other one is looked up."""
BLOCK = 1024
"""Photographs looked at together: 13 MB at 64 x 64."""


class Found(NamedTuple):
    """For each picture its nearest photographs, nearest first."""

    distances: np.ndarray
    """(Q, K) float64: root mean square difference, in levels of 255."""
    items: np.ndarray
    """(Q, K) int64: rows of the dataset."""


class Photographs:
    """The images of a dataset as the networks are trained on them, but unmoved: no flip, random crop or jitter.

    Out of the decoded images that a run left in the cache, else decoded by Pillow, which needs no start and agrees with
    DALI to a quarter of a level, block by block.

    Args:
        threads: decode threads.
    """

    def __init__(self, cfg: DataConfig, dataset: Dataset, threads: int) -> None:
        self.cfg, self.dataset, self.threads = cfg, dataset, threads
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder, _ = choose_decoder(cfg)
        self._kept: Pixels | None = None
        if cache_file(cache_folder(cfg), cfg, dataset.fingerprint, decoder, device).exists():
            cached = build_cache(cfg, dataset, decoder=decoder, kind="host", device=device, threads=threads)
            assert isinstance(cached.images, np.ndarray)
            self._kept = cached.images

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def decoded(self) -> bool:
        """Whether they need no decoding any more."""
        return self._kept is not None

    def take(self, items: np.ndarray) -> Pixels:
        """(N, H, W, C) of these rows."""
        return np.concatenate(list(self._windows([items])))

    def blocks(self) -> Iterator[Pixels]:
        """All of them in order, (N, H, W, C) with N up to BLOCK."""
        starts = range(0, len(self), BLOCK)
        yield from self._windows([np.arange(start, min(start + BLOCK, len(self))) for start in starts])

    def _windows(self, wanted: list[np.ndarray]) -> Iterator[Pixels]:
        """Raises DataError where no file of the dataset is good any more."""
        kept = self._kept
        if kept is not None:
            for items in wanted:
                block = (np.diff(items) == 1).all()  # as a slice it needs no copy
                rows = slice(items[0], items[-1] + 1) if block else items
                yield middle(kept[rows], self.cfg)
            return
        window = window_shape(self.cfg)
        with contextlib.closing(PillowDecoder(self.dataset, window[:2], window[2], self.threads)) as pillow:
            for images in pillow.windows(wanted):
                yield middle(images, self.cfg)


def open_photographs(cfg: DataConfig, threads: int) -> Photographs:
    """The photographs of data.dataroot.

    Raises:
        ConfigError, DataError, StorageError: they cannot be had, in one line.
    """
    told = logging.getLogger("pipeline.index")
    level = told.level
    told.setLevel(logging.ERROR)  # the run has named the files that are left out
    try:
        dataset = open_dataset(cfg)
    finally:
        told.setLevel(level)
    return Photographs(cfg, dataset, threads)


def small(images: Pixels) -> np.ndarray:
    """What pictures are compared by: their colours, averaged over squares until a side is 16 to 31 pixels.

    Args:
        images: (N, H, W, C) uint8; of four channels the last, alpha, is left out.

    Returns:
        (N, D) float32 around 0.
    """
    count, height, width, channels = images.shape
    side = 1
    while min(height, width) >= 2 * side * SMALL_SIDE and height % (2 * side) == width % (2 * side) == 0:
        side *= 2
    rows = images.reshape(count, height, width * channels)
    added = np.zeros((count, height // side, width * channels), np.uint16)  # rows first: 6 times as fast as squares
    for y in range(side):
        added += rows[:, y::side]
    added = added.reshape(count, height // side, width, channels)
    total = np.zeros((count, height // side, width // side, min(channels, 3)), np.uint32)
    for x in range(side):
        total += added[:, :, x::side, :3]
    return (total.astype(np.float32) / side**2 - 127.5).reshape(count, -1)


def nearest(queries: np.ndarray, photographs: Iterator[Pixels], count: int) -> Found:
    """The `count` photographs nearest to each picture, over blocks of them; fewer where there are fewer.

    Args:
        queries: (Q, D), as `small` gives.
        photographs: blocks of (N, H, W, C) uint8.

    The search is by |a|^2 - 2ab + |b|^2 in float32; the distances of what it found are computed anew in float64.
    """
    best = np.empty((len(queries), 0), np.float32)
    items = np.empty((len(queries), 0), np.int64)
    kept = np.empty((len(queries), 0, queries.shape[1]), np.float32)
    done = 0
    for block in photographs:
        theirs = small(block)
        squares = (theirs**2).sum(1) - 2 * queries @ theirs.T
        near = np.argpartition(squares, min(count, len(theirs)) - 1, axis=1)[:, :count]
        best = np.concatenate([best, np.take_along_axis(squares, near, 1)], axis=1)
        items = np.concatenate([items, near + done], axis=1)
        kept = np.concatenate([kept, theirs[near]], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :count]
        best, items = np.take_along_axis(best, order, 1), np.take_along_axis(items, order, 1)
        kept = np.take_along_axis(kept, order[..., None], 1)
        done += len(theirs)
    distances = np.sqrt(np.mean((kept.astype(np.float64) - queries[:, None]) ** 2, axis=2))
    order = np.argsort(distances, axis=1, kind="stable")
    return Found(np.take_along_axis(distances, order, 1), np.take_along_axis(items, order, 1))


def look_up(samples: Pixels, photographs: Photographs) -> tuple[Found, np.ndarray]:
    """The photographs nearest to each sample, and the yardstick: of some photographs, how far the nearest other one is.

    Where training mirrors images, a photograph's mirror image counts as the photograph.

    Args:
        samples: (N, H, W, C) uint8.
        photographs: at least two.

    Returns:
        NEAREST photographs for each sample, and distances (up to YARDSTICKS,) float64.
    """
    ways = 2 if photographs.cfg.flip else 1
    some = np.array(evenly(len(photographs), YARDSTICKS))
    both = np.concatenate([samples, photographs.take(some)])
    queries = small(np.concatenate([both, both[:, :, ::-1]]) if ways == 2 else both)
    found = nearest(queries, photographs.blocks(), NEAREST + 1)  # one more: a photograph finds itself
    distances = np.concatenate(np.split(found.distances, ways), axis=1)
    items = np.concatenate(np.split(found.items, ways), axis=1)
    order = np.argsort(distances, axis=1, kind="stable")
    distances, items = np.take_along_axis(distances, order, 1), np.take_along_axis(items, order, 1)
    num = len(samples)
    others = np.where(items[num:] == some[:, None], np.inf, distances[num:])
    return _distinct(Found(distances[:num], items[:num])), others.min(axis=1)


def _distinct(found: Found) -> Found:
    """Each photograph once, at its nearer way round; NEAREST of them."""
    count = min(NEAREST, min(len(set(row)) for row in found.items.tolist()))
    columns = np.array([[row.index(item) for item in dict.fromkeys(row)][:count] for row in found.items.tolist()])
    return Found(np.take_along_axis(found.distances, columns, 1), np.take_along_axis(found.items, columns, 1))
