"""Random numbers that are a pure function of (seed, image number, stream, lane): Philox4x32-10.

No state, so resuming costs nothing, and every rank, decoder and thread draws the same numbers for the same image.
Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011); constants from Random123.

The arithmetic is written for any array of 64-bit integers, so that one text serves NumPy (the reader threads) and
torch (latents, on the CPU or the GPU).  A signed product wraps to the same 64 bits as an unsigned one, and the mask
after the shift removes the sign.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
WEYL0, WEYL1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is drawn for; streams never share a number."""

    ORDER = 0
    LATENT = 1
    AUGMENT = 2
    FIXED_LATENT = 3
    SAMPLE_LATENT = 4
    RECALIBRATE_LATENT = 5
    EVALUATION_LATENT = 6
    DIFFAUGMENT = 7
    INSTANCE_NOISE = 8
    PENALTY = 9
    SWD_PATCH = 10
    SWD_DIRECTION = 11
    NEIGHBOUR = 12


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 arrays of one shape (NumPy or torch), values below 2^32.
        key: two integers below 2^32.

    Returns:
        Four int64 arrays of that shape, uniform over 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL0) & WORD, (k1 + WEYL1) & WORD
    return c0, c1, c2, c3


def key_of(seed: int) -> tuple[int, int]:
    """The two key words of a seed below 2^64."""
    return seed & WORD, (seed >> 32) & WORD


def words(seed: int, stream: Stream, numbers: np.ndarray, lane: int = 0) -> np.ndarray:
    """Four random words for each image number.

    Args:
        numbers: (N,) int64, at least 0.

    Returns:
        (N, 4) int64, uniform over 0 .. 2^32 - 1.
    """
    n = np.asarray(numbers, dtype=np.int64)
    counter = (n & WORD, n >> 32, np.full_like(n, int(stream)), np.full_like(n, lane))
    return np.stack(philox4x32(counter, key_of(seed)), axis=-1)


def uniform(seed: int, stream: Stream, numbers: np.ndarray, lane: int = 0) -> np.ndarray:
    """(N, 4) float64 in [0, 1), four for each image number."""
    return words(seed, stream, numbers, lane) * 2.0**-32


def normal(seed: int, stream: Stream, numbers: Tensor, length: int) -> Tensor:
    """Standard normals by Box-Muller, `length` for each image number.

    Computed in float64 and rounded once, so that CPU and GPU, whose float64 logarithms may differ in the last bit,
    agree in float32 but for a rare rounding tie.

    Args:
        numbers: (N,) int64, at least 0, on the device that shall draw.

    Returns:
        (N, length) float32 on that device.
    """
    a, b, c, d = _device_words(seed, stream, numbers, -(-length // 4), 0)
    pairs = []
    for u, v in ((a, b), (c, d)):
        radius = torch.sqrt(-2.0 * torch.log((u.double() + 1.0) * 2.0**-32))  # (0, 1]: the logarithm stays finite
        angle = v.double() * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :length].float()


def uniform_float32(seed: int, stream: Stream, numbers: Tensor, length: int, lane: int = 0) -> Tensor:
    """Uniform over [0, 1), `length` for each image number; the upper 24 bits of each word, which float32 holds exactly.

    Args:
        numbers: (N,) int64, at least 0, on the device that shall draw.
        lane: four numbers come from each lane, from this one on.

    Returns:
        (N, length) float32 on that device.
    """
    drawn = torch.stack(_device_words(seed, stream, numbers, -(-length // 4), lane), dim=-1).flatten(1)[:, :length]
    return (drawn >> 8).float() * 2.0**-24


def _device_words(
    seed: int, stream: Stream, numbers: Tensor, num_lanes: int, lane: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four (N, num_lanes) int64 of random words below 2^32 for each image number, from `lane` on, on its device."""
    n = numbers[:, None]
    lanes = torch.arange(lane, lane + num_lanes, device=numbers.device)[None, :]
    zero = torch.zeros_like(n + lanes)
    counter = (zero + (n & WORD), zero + (n >> 32), zero + int(stream), zero + lanes)
    return philox4x32(counter, key_of(seed))
