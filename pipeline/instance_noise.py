"""Gaussian noise on what D sees, real and generated alike, that fades as training goes on.

Sonderby, Caballero, Theis, Shi, Huszar 2017, "Amortised MAP inference for image super-resolution", section 3.2, and
Arjovsky and Bottou 2017, "Towards principled methods for training generative adversarial networks", section 3: blurred
by noise, the two distributions overlap, and D has something to teach before it can tell them apart for certain.

An image's noise is a window, at a place drawn for its number, of one fixed table of normals (the shared noise table of
Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning", section 2).  Within an
image the numbers are independent normals; two images of 64 x 64 x 3 share some with a chance of 0.6 %, at other pixels.
Drawing each number by Philox takes 50 times as long on a CPU (128 images of 64 x 64 x 3: 87 ms against 1.6 ms on one
core, 2026-11), three times a step; the table takes 0.3 s, once.

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.philox import Stream, normal, uniform_float32

PLACES = 1 << 22
"""Places that a window may begin at.  The table takes four bytes for each, 16 MiB, and a window more."""
TABLE_SEED = 1 << 63
"""That of no run."""


@lru_cache(maxsize=2)
def _table(window: int, device: torch.device) -> Tensor:
    """(PLACES + window,) float32 standard normals, the same in every run; made at the first use."""
    rows, columns = 1 << 12, -(-(PLACES + window) // (1 << 12))
    numbers = torch.arange(rows, device=device)
    return torch.cat(
        [normal(TABLE_SEED, Stream.INSTANCE_NOISE, part, columns) for part in numbers.split(256)]
    ).flatten()


def instance_noise(images: Tensor, std: float | Tensor, seed: int, stream_offset: int, numbers: Tensor) -> Tensor:
    """The images with noise on every channel.

    Args:
        images: (N, C, H, W), any float dtype and memory format, both of which are kept; pixels may leave [-1, 1].
        std: of the noise, in units of [-1, 1] pixels; a number or a tensor of one.
        seed: of the run.
        stream_offset: which of the batches that one image number stands for: the real one, a generated one.  At
            least 0; each has noise of its own.
        numbers: (N,) int64 image numbers, on the images' device.

    Returns:
        (N, C, H, W), differentiable in the images; a function of seed, offset and number for each image.
    """
    count, channels, height, width = images.shape
    window = channels * height * width
    drawn = uniform_float32(seed, Stream.INSTANCE_NOISE, numbers, 1, lane=stream_offset)[:, 0]
    places = (drawn.double() * PLACES).long()
    windows = _table(window, images.device).unfold(0, window, 1).index_select(0, places)
    noise = windows.view(count, height, width, channels).permute(0, 3, 1, 2)
    return (images + std * noise).to(images.dtype)


def std_at(noise: float, noise_images: int, images_seen: int) -> float:
    """The noise's standard deviation after images_seen images: `noise` at 0, a straight line to 0 at noise_images."""
    return noise * max(0.0, 1.0 - images_seen / noise_images)
