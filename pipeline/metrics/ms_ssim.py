"""MS-SSIM between random pairs of a set: how alike its pictures are; near 1 where all are one picture.

Odena et al. 2017, section 4.2, use it for diversity; the measure is that of Wang, Simoncelli and Bovik 2003.  As in the
program of Karras et al. 2018, whose figures it shall compare with:
- channels count alike, each by itself, on pixel values 0 to 255; no conversion to luma;
- scales are 2 x 2 means; the Gaussian window is 11 x 11 with sigma 1.5, without borders; where the picture is smaller
  than that, the window is as large as its shorter side and sigma shrinks in proportion (at 64 x 64: 11, 11, 11, 8, 4);
- of an image's contrast term a negative mean counts as 0.

At 64 x 64 and above there are the five scales of the paper with its weights.  A smaller image has as many of them as
leave its shorter side at least 4 pixels, the finest first, with weights brought to a sum of 1.

Legend: N images or pairs, H x W pixels, C channels.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import Pixels
from pipeline.metrics.swd import Images
from pipeline.order import Order

Array = NDArray[Any]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SEED = 0
"""Of the pairs."""
LEAST_SIDE = 4
"""Pixels of the coarsest scale's shorter side."""
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_CHUNK = 32  # pairs at a time and thread


def scale_weights(height: int, width: int) -> Array:
    """The weight of each scale, finest first: all five as they stand in the paper, fewer brought to a sum of 1."""
    count = 1
    while count < len(WEIGHTS) and min(height, width) >> count >= LEAST_SIDE:
        count += 1
    weights = np.array(WEIGHTS[:count])
    return weights if count == len(WEIGHTS) else weights / weights.sum()


def pairs(count: int) -> Array:
    """(N // 2, 2) int64: every image but an odd last one in one pair, at random, the same every time."""
    return Order(SEED, count).permutation(0)[: count // 2 * 2].reshape(-1, 2)


def ms_ssim(one: Pixels, other: Pixels) -> Array:
    """(N,) float64, from 0 to 1: the similarity of each image with the other at its place, 1 where they are equal.

    Args:
        one, other: (N, H, W, C) uint8.
    """
    weights = scale_weights(*one.shape[1:3])
    # By planes, so that a window is two matrix products.
    a, b = (images.transpose(0, 3, 1, 2).astype(np.float64) for images in (one, other))
    found = np.ones(len(one))
    for scale, weight in enumerate(weights):
        contrast, whole = _similarity(a, b)
        last = scale == len(weights) - 1
        found *= np.maximum(whole if last else contrast, 0) ** weight
        if not last:
            a, b = _halved(a), _halved(b)
    return found


def _similarity(a: Array, b: Array) -> tuple[Array, Array]:
    """The means (N,) over places and channels of contrast and structure, and of these times luminance."""
    height, width = a.shape[2:]
    size = min(_WINDOW, height, width)
    rows, columns = _windows(height, size), _windows(width, size).T

    def seen(values: Array) -> Array:
        return rows @ (values @ columns)

    mean_a, mean_b = seen(a), seen(b)
    square_a, square_b, product = mean_a * mean_a, mean_b * mean_b, mean_a * mean_b
    # In parentheses, so that equal images give exactly 1.
    spread = (seen(a * a) - square_a) + (seen(b * b) - square_b)
    contrast = (2 * (seen(a * b) - product) + _C2) / (spread + _C2)
    luminance = (2 * product + _C1) / (square_a + square_b + _C1)
    return contrast.mean((1, 2, 3)), (luminance * contrast).mean((1, 2, 3))


def _windows(length: int, size: int) -> Array:
    """(length - size + 1, length): the Gaussian at each of its places in a row."""
    place = np.arange(size) - (size - 1) / 2
    gaussian = np.exp(-0.5 * np.square(place / (size * _SIGMA / _WINDOW)))
    gaussian /= gaussian.sum()
    out = np.zeros((length - size + 1, length))
    for i, row in enumerate(out):
        row[i : i + size] = gaussian
    return out


def _halved(values: Array) -> Array:
    """(N, C, H / 2, W / 2): means over 2 x 2."""
    count, channels, height, width = values.shape
    return values.reshape(count, channels, height // 2, 2, width // 2, 2).mean((3, 5))


def similarities(images: Images, which: Array, pool: Executor) -> Array:
    """(N,) float64: the MS-SSIM of some of a set's pairs (N, 2)."""

    def one_by_one(numbers: Array) -> Pixels:
        return np.concatenate([images(i, i + 1) for i in numbers.tolist()])

    def part(start: int) -> Array:
        first, second = which[start : start + _CHUNK].T
        return ms_ssim(one_by_one(first), one_by_one(second))

    return np.concatenate([np.empty(0), *pool.map(part, range(0, len(which), _CHUNK))])
