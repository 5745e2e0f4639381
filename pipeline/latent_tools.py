"""What one does with latents besides drawing them: truncation, and arithmetic as in figure 7 of the DCGAN paper.

Legend: N latents of length nz; H x W pixels, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.philox import Stream, uniform_float32
from pipeline.pictures import GAP, grid, to_image

LARGEST_OPERANDS = 64
"""Sample numbers in one sum; the figure shows them all."""
NEIGHBOURS = 8
NEIGHBOUR_SCALE = 0.25
"""The paper's, whose latents are uniform in [-1, 1]; beside standard normal ones neighbours are nearer."""
_SIGN = 12
"""Pixels that a sign takes across."""


def truncated(latents: Tensor, threshold: float) -> Tensor:
    """The latents as draws from the normal distribution cut off at plus and minus the threshold.

    The truncation trick of Marchesi 2017, "Megapixel size image creation using generative adversarial networks", and
    Brock et al. 2019, "Large scale GAN training for high fidelity natural image synthesis", section 3.1, where a value
    outside is drawn again until it falls inside.  The same distribution comes here from the monotone map between the
    two, so that a latent keeps its face: the higher the threshold, the less it moves.  (Scaling the latents instead
    would leave no value of a normal distribution out, only make it narrower.)

    Pictures become fewer kinds of picture, nearer to the mean one.  A latent of nz normals is sqrt(nz) long, give or
    take 0.7, and G has been trained at no other length: one cut off at 2 is 0.88 times as long, at 1 0.54 times, at
    0.5 0.28 times, where a DCGAN draws little but that mean.

    Args:
        latents: (N, nz) float32, standard normal.
        threshold: above 0; 2 leaves 95 % of the values inside as they come, 0.5 about 38 %.

    Returns:
        (N, nz) float32 within [-threshold, threshold].
    """
    # P(|Z'| > s') = P(|Z| > s) P(|Z| <= threshold) + P(|Z| > threshold).  By erfc, since torch's ndtr is 0 below -8.3.
    outside = math.erfc(threshold / math.sqrt(2))
    beyond = torch.special.erfc(latents.double().abs() / math.sqrt(2)) * (1 - outside) + outside
    sizes = (-torch.special.ndtri(beyond / 2)).clamp(0, threshold)
    return (sizes * latents.sign()).float()


@dataclass(frozen=True)
class Term:
    """The mean of some samples' latents, added or taken away."""

    sign: int
    """1 or -1."""
    numbers: tuple[int, ...]


def parse_sum(text: str) -> list[Term]:
    """'0,3,5 - 1,2 + 7' as terms: the mean of samples 0, 3 and 5, less that of 1 and 2, plus sample 7.

    Raises:
        ConfigError: it is no such sum.
    """
    parts = re.split("([+-])", text)
    terms = []
    for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True):
        words = [word.strip() for word in part.split(",")]
        if not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
            raise ConfigError(f"--arithmetic must be like '0,3,5 - 1,2 + 7' in sample numbers, got {text!r}")
        terms.append(Term(1 if sign == "+" else -1, tuple(map(int, words))))
    count = sum(len(term.numbers) for term in terms)
    if count > LARGEST_OPERANDS:
        raise ConfigError(f"--arithmetic must have at most {LARGEST_OPERANDS} sample numbers, got {count}")
    return terms


def total(terms: Sequence[Term], means: Tensor) -> Tensor:
    """(nz,) the sum of the terms' means (T, nz), each with its sign.  Radford et al. 2016, section 6.3.2.

    Means of three lie nearer the middle than any sample, at about 1 / sqrt(3) of its length; a sum of three such means
    is as long as a sample again.  Nothing is rescaled.
    """
    return (means * torch.tensor([term.sign for term in terms], device=means.device)[:, None]).sum(0)


def neighbours(latent: Tensor, seed: int) -> Tensor:
    """(9, nz): the latent in the middle of eight with uniform noise of +-0.25 added, as in the paper's figure 7."""
    numbers = torch.arange(NEIGHBOURS, device=latent.device)
    noise = NEIGHBOUR_SCALE * (2 * uniform_float32(seed, Stream.NEIGHBOUR, numbers, len(latent)) - 1)
    around = latent + noise
    return torch.cat([around[: NEIGHBOURS // 2], latent[None], around[NEIGHBOURS // 2 :]])


def figure(terms: Sequence[Term], samples: Sequence[Tensor], means: Tensor, results: Tensor) -> Image.Image:
    """The paper's figure 7: a column of samples for each term with their mean below, and what the sum comes to.

    Args:
        samples: (n, H, W, C) uint8 for each term.
        means: (T, H, W, C) uint8, the pictures of the terms' means.
        results: (9, H, W, C) uint8, the sum's in the middle of its neighbours.

    Returns:
        The means stand in the lowest row with the signs between them; on the right, after =, the results.
    """
    _, height, width, channels = means.shape
    longest = max(len(s) for s in samples)
    rows = max(longest + 1, 3)
    low = (rows - 1) * (height + GAP) + 2 * GAP
    step = width + 2 * GAP + _SIGN
    right = len(terms) * step
    size = (right + 3 * (width + GAP) - GAP, low + height)
    canvas = Image.new(to_image(means[0]).mode, size, (255, 255, 255, 0)[:channels] if channels > 1 else 255)
    draw = ImageDraw.Draw(canvas)
    for i, (term, column, mean) in enumerate(zip(terms, samples, means, strict=True)):
        for j, sample in enumerate(column):
            canvas.paste(to_image(sample), (i * step, (rows - 1 - len(column) + j) * (height + GAP)))
        canvas.paste(to_image(mean), (i * step, low))
        if i:
            _draw_sign(draw, "+" if term.sign > 0 else "-", i * step, low + height // 2, channels)
    _draw_sign(draw, "=", right, low + height // 2, channels)
    canvas.paste(grid(results, columns=3), (right, size[1] - 3 * (height + GAP) + GAP))
    return canvas


def _draw_sign(draw: ImageDraw.ImageDraw, sign: str, left: int, middle: int, channels: int) -> None:
    """A sign in the gap that ends at `left`."""
    black = (0, 0, 0, 255)[:channels] if channels > 1 else 0
    half = _SIGN // 2 - 2
    x = left - GAP - _SIGN // 2
    for y in (middle - 2, middle + 2) if sign == "=" else (middle,):
        draw.rectangle((x - half, y, x + half, y + 1), fill=black)
    if sign == "+":
        draw.rectangle((x, middle - half, x + 1, middle + half + 1), fill=black)
