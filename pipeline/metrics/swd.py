"""SWD: the sliced Wasserstein distance of two sets of images, level by level of a Laplacian pyramid.

Karras et al. 2018 ("Progressive Growing of GANs"), section 5, with the numbers of its program.  A level shows structure
of one size: the finest one edges and skin, the coarsest one, blurred and not a difference, the whole head.  From each
level of each image come 128 patches of 7 x 7 pixels.  Per level and set, channels are brought to mean 0 and deviation
1, and all patches are projected onto 512 directions; the distance in a direction is the mean of |a - b| over the two
sorted rows of projections.  SWD is the mean over directions, times 1000, and over levels.

It has a floor that falls as N grows: two sets from the same source are not 0 apart.  Only figures of equal N compare.

The mean over sorted rows is had without sorting them (pipeline/metrics/wasserstein.py), five times as fast.  So the
real images' projections are worked out each time: kept on disk, those of 5,000 would take 3.7 GiB.

Legend: N images, H x W pixels, C channels; P patches of all images of a set (128 N), K numbers in one (49 C); D
directions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import philox
from pipeline.decode import Pixels
from pipeline.metrics.wasserstein import mean_gap
from pipeline.philox import Stream

Array = NDArray[Any]
Images = Callable[[int, int], Pixels]
"""images(start, stop): (stop - start, H, W, C) uint8, the same ones every time; called from several threads."""

SEED = 0
"""Of patches and directions: the same in every run, so that equal images give equal figures."""
PATCHES = 128
SIDE = 7
DIRECTIONS = 512
LEAST_SIDE = 16
"""A level's shorter side, unless the image itself is smaller."""
SET_BYTES = 3 << 29
"""What one set may take in memory while a level is compared: its projections onto a block of directions and, where they
fit into two thirds of this, its patches.  Of more than 14,000 images in colour they are cut anew for each block."""
_CHUNK = 64  # images at a time and thread: their pyramid and patches stay in a core's cache
_LEVELS = 16  # more than there can be


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each level, finest first: halved while the shorter side stays at least 16; at 64 x 64 three.

    With sides that data.image_size allows all of these are whole.
    """
    sizes = [(height, width)]
    while min(sizes[-1]) // 2 >= LEAST_SIDE:
        assert sizes[-1][0] % 2 == 0, sizes
        assert sizes[-1][1] % 2 == 0, sizes
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def directions(channels: int) -> Array:
    """(512, K) float32: unit vectors, uniform over the sphere, the same every time."""
    numbers = torch.arange(DIRECTIONS)
    drawn = philox.normal(SEED, Stream.SWD_DIRECTION, numbers, SIDE * SIDE * channels).numpy().astype(np.float64)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def _mirrored(place: Array, length: int) -> Array:
    """Where a place just outside 0 .. length - 1 is mirrored to, the border itself not repeated."""
    return length - 1 - np.abs(length - 1 - np.abs(place))


def _halving(length: int) -> Array:
    """(length / 2, length) float32: every second value of the row under (1, 4, 6, 4, 1) / 16."""
    out = np.zeros((length // 2, length), np.float32)
    rows = np.arange(length // 2)
    for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        np.add.at(out, (rows, _mirrored(2 * rows + offset, length)), weight / 16)
    return out


def _doubling(length: int) -> Array:
    """(2 length, length) float32: the row with zeros between its values under (1, 4, 6, 4, 1) / 8."""
    out = np.zeros((2 * length, length), np.float32)
    rows = np.arange(2 * length)
    for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        source = _mirrored(rows + offset, 2 * length)
        filled = source % 2 == 0
        np.add.at(out, (rows[filled], source[filled] // 2), weight / 8)
    return out


class Pyramid:
    """One level of the Laplacian pyramid of images, and the patches of it."""

    def __init__(self, height: int, width: int, level: int) -> None:
        sizes = level_sizes(height, width)
        self.level, self.size = level, sizes[level]
        self._down = [(_halving(h), _halving(w).T) for h, w in sizes[: min(level + 1, len(sizes) - 1)]]
        self._up: tuple[Array, Array] | None = None
        if level + 1 < len(sizes):
            h, w = sizes[level + 1]
            self._up = _doubling(h), _doubling(w).T

    def images(self, pixels: Pixels) -> Array:
        """(N, h, w, C) float32, contiguous, of (N, H, W, C) uint8: what the next coarser level does not show of this
        one; of the coarsest all."""
        blurred = [np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)]  # by planes, for the products
        for rows, columns in self._down:
            blurred.append(rows @ (blurred[-1] @ columns))
        found: Array = blurred[self.level]
        if self._up is not None:
            rows, columns = self._up
            found = found - rows @ (blurred[-1] @ columns)
        return np.ascontiguousarray(found.transpose(0, 2, 3, 1))

    def corners(self, start: int, stop: int) -> tuple[Array, Array]:
        """Top and left of the patches of images start .. stop - 1, (N, 128) int64 each: every place equally often.

        A function of image number and level alone, and the same in both sets.
        """
        each = PATCHES // 2  # four words to a number, two to a patch
        first = (np.arange(start, stop)[:, None] * _LEVELS + self.level) * each
        drawn = philox.words(SEED, Stream.SWD_PATCH, first + np.arange(each)).reshape(stop - start, PATCHES, 2)
        places = np.array(self.size) - SIDE + 1
        top, left = np.moveaxis(drawn * places >> 32, -1, 0)
        return top, left

    def patches(self, images: Images, start: int, stop: int) -> Array:
        """(128 n, K) float32: the patches of images start .. stop - 1 as they are."""
        found = self.images(images(start, stop))
        count, height, width, channels = found.shape
        # All patches there could be, as a view in which each is 7 runs of 7 C numbers.
        everywhere = np.lib.stride_tricks.as_strided(
            found,
            (count, height - SIDE + 1, width - SIDE + 1, SIDE, SIDE * channels),
            (*found.strides[:3], found.strides[1], found.itemsize),
            writeable=False,
        )
        top, left = self.corners(start, stop)
        return everywhere[np.arange(count)[:, None], top, left].reshape(-1, SIDE * SIDE * channels)


class Patches:
    """The patches of one level of a set, each channel brought to mean 0 and deviation 1 over all of them.

    They are cut when they are first asked for.
    """

    def __init__(self, images: Images, count: int, size: tuple[int, int, int], level: int, pool: Executor) -> None:
        """
        Args:
            images: the set.
            count: how many there are.
            size: H, W and C.
            level: of the pyramid, 0 the finest.
            pool: threads to work in.
        """
        height, width, self._channels = size
        self._images, self._count, self._pool = images, count, pool
        self._pyramid = Pyramid(height, width, level)
        self._held: Array | None = None
        self._projections: Array | None = None
        self._scale: tuple[Array, Array] | None = None
        """Mean and deviation, (K,) float32 each."""

    def _cut(self) -> None:
        length = SIDE * SIDE * self._channels
        held = None
        if held_bytes(self._count, self._channels):
            held = np.empty((self._count * PATCHES, length), np.float32)

        def sums(part: range) -> Array:
            """Of x and of x^2, (2, K) float64."""
            found = self._pyramid.patches(self._images, part.start, part.stop)
            if held is not None:
                held[self._rows(part)] = found
            exact = found.astype(np.float64)
            return np.stack([exact.sum(0), np.square(exact).sum(0)])

        # Added in the order of the images, however many threads there are.
        everything = sum(self._pool.map(sums, self._parts()), start=np.zeros((2, length)))
        total, squares = everything.reshape(2, SIDE * SIDE, self._channels).sum(1)
        of_each = self._count * PATCHES * SIDE * SIDE
        mean = total / of_each
        variance = np.maximum(squares / of_each - np.square(mean), 0)
        # A channel that never changes, as alpha often, stays 0.
        deviation = np.where(variance > 1e-9, np.sqrt(variance), 1.0)
        self._scale = np.tile(mean, SIDE * SIDE).astype(np.float32), np.tile(deviation, SIDE * SIDE).astype(np.float32)
        if held is not None:
            list(self._pool.map(lambda part: self._normalise(held[self._rows(part)]), self._parts()))
        self._held = held

    def _parts(self) -> list[range]:
        return [range(i, min(i + _CHUNK, self._count)) for i in range(0, self._count, _CHUNK)]

    @staticmethod
    def _rows(part: range) -> slice:
        return slice(part.start * PATCHES, part.stop * PATCHES)

    def _normalise(self, patches: Array) -> None:
        assert self._scale is not None
        mean, deviation = self._scale
        np.subtract(patches, mean, out=patches)
        np.divide(patches, deviation, out=patches)

    def projected(self, onto: Array) -> Array:
        """(D, P) float32: each row the patches along one of the directions (D, K); the next call takes its memory."""
        if self._scale is None:
            self._cut()
        if self._projections is None or len(self._projections) != len(onto):
            # Fresh memory each time would cost as much time as what is written to it.
            self._projections = np.empty((len(onto), self._count * PATCHES), np.float32)
        out, directions = torch.from_numpy(self._projections), torch.from_numpy(onto)

        def project(part: range) -> None:
            rows = self._rows(part)
            if self._held is not None:
                found = self._held[rows]
            else:
                found = self._pyramid.patches(self._images, part.start, part.stop)
                self._normalise(found)
            # By torch, whose threads can be kept to one an operation; NumPy's would get in the way of the pool's.
            torch.mm(directions, torch.from_numpy(found).T, out=out[:, rows])

        list(self._pool.map(project, self._parts()))
        return self._projections


def held_bytes(count: int, channels: int) -> int:
    """What the patches of a set of N images take where they are held; 0: they are too many."""
    needed = count * PATCHES * SIDE * SIDE * channels * 4
    return needed if needed <= SET_BYTES * 2 // 3 else 0


def block_size(count: int, channels: int) -> int:
    """Directions at a time for N images: a power of two up to 64, so that all are some whole blocks."""
    size = DIRECTIONS // 8
    while size > 1 and size * count * PATCHES * 4 > SET_BYTES - held_bytes(count, channels):
        size //= 2
    return size


def distances(one: Patches, other: Patches, onto: Array, pool: Executor) -> list[float]:
    """The distance of two sets along each of the directions (D, K)."""
    return list(pool.map(mean_gap, one.projected(onto), other.projected(onto)))
