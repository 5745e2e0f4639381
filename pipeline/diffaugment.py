"""Differentiable augmentation of what D sees, real and generated alike, so that few photographs last longer.

Zhao, Liu, Lin, Zhu, Han 2020, "Differentiable augmentation for data-efficient GAN training", section 3 and appendix A;
ranges and rounding as in the authors' code.  The gradient passes through to G, and to the images where a penalty asks
for it, twice.  What each image meets comes from numbers that the caller draws, so that it depends on the seed and the
image's number alone.

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.philox import Stream, uniform_float32

TRANSLATION = 0.125
"""Largest shift along each axis, as a share of the side."""
CUTOUT = 0.5
"""Side of the rectangle cut out, as a share of the image's."""
NUM_DRAWS = 7
"""Numbers an image needs: brightness, saturation, contrast, shift down and right, middle of the cut in y and x.  Each
has its own, so that a policy added changes nothing of the others."""


def draws(seed: int, numbers: Tensor, part: int) -> Tensor:
    """The numbers that `diffaugment` wants.

    Args:
        numbers: (N,) int64, the image numbers.
        part: which of the batches that one image number stands for: the real one, a generated one.  At least 0.

    Returns:
        (N, NUM_DRAWS) float32 in [0, 1), where `numbers` lies.
    """
    return uniform_float32(seed, Stream.DIFFAUGMENT, numbers, NUM_DRAWS, lane=part * -(-NUM_DRAWS // 4))


def diffaugment(images: Tensor, policy: Sequence[str], draws: Tensor) -> Tensor:
    """The images under each augmentation of the policy, in its order.

    Pixels may leave [-1, 1]; what is shifted in or cut out becomes 0, mid-gray, in all channels.

    Args:
        images: (N, C, H, W) in [-1, 1], any float dtype and memory format, both of which are kept; C of 1, 3 or 4.
        policy: of "color", "translation" and "cutout"; empty gives the images as they are.
        draws: (N, NUM_DRAWS) in [0, 1), on the images' device.

    Returns:
        (N, C, H, W), differentiable in the images.
    """
    for name in policy:
        images = AUGMENTATIONS[name](images, draws)
    return images


def _color(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness by up to half a unit of [-1, 1], then saturation by 0 to 2, then contrast by 0.5 to 1.5.

    The three are one affine map of the pixel, of its mean over the colours and of the image's mean.  Alpha, the fourth
    channel, stays as it is.
    """
    colours = images[:, :3].to(torch.promote_types(images.dtype, torch.float32))
    brightness, saturation, contrast = draws[:, :3, None, None, None].to(colours.dtype).unbind(1)
    brightness, saturation, contrast = brightness - 0.5, saturation * 2, contrast + 0.5
    gray, middle = colours.mean(1, keepdim=True), colours.mean((1, 2, 3), keepdim=True)
    mapped = contrast * (saturation * colours + (1 - saturation) * gray) + (1 - contrast) * middle + brightness
    mapped = mapped.to(images.dtype)
    return mapped if images.shape[1] <= 3 else torch.cat([mapped, images[:, 3:]], dim=1)


class _Shift(torch.autograd.Function):
    """Each image moved by whole pixels, at most `_most_shift` along an axis, zeros moved in.

    The gradient is the shift back, a copy as well: autograd's own would add up with atomics, in no fixed order.  Rows
    are copied whole, out of a padded image: 20 times as fast on a CPU as picking pixels (0.8 ms against 17 ms for 128
    images of 64 x 64 x 3 on one busy core, 2026-11).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(down, right)
        count, channels, height, width = images.shape
        top, left = _most_shift(height), _most_shift(width)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
        rows = padded.view(-1).unfold(0, width * channels, channels)  # a row may begin at any pixel
        y = torch.arange(height, device=images.device) + (top - down)[:, None]
        n = torch.arange(count, device=images.device)[:, None]
        begins = (n * padded.shape[1] + y) * padded.shape[2] + (left - right)[:, None]
        moved = rows.index_select(0, begins.flatten()).view(count, height, width, channels)
        return torch.empty_like(images).copy_(moved.permute(0, 3, 1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        down, right = ctx.saved_tensors
        return _Shift.apply(gradient, -down, -right), None, None


def _most_shift(side: int) -> int:
    return int(side * TRANSLATION + 0.5)


def _translation(images: Tensor, draws: Tensor) -> Tensor:
    """Shifted by up to an eighth of the side along each axis, zeros moved in."""
    most = [_most_shift(side) for side in images.shape[2:]]
    down, right = (_integers(draws[:, 3 + i], 2 * m + 1) - m for i, m in enumerate(most))
    shifted: Tensor = _Shift.apply(images, down, right)
    return shifted


def _cutout(images: Tensor, draws: Tensor) -> Tensor:
    """Half the height times half the width set to 0, about any pixel, so that part of it may fall outside."""
    inside = []
    for i, side in enumerate(images.shape[2:]):
        length = int(side * CUTOUT + 0.5)
        first = _integers(draws[:, 5 + i], side + 1 - length % 2) - length // 2
        place = torch.arange(side, device=images.device) - first[:, None]
        inside.append((place >= 0) & (place < length))
    kept = ~(inside[0][:, :, None] & inside[1][:, None, :])
    return images * kept[:, None].to(images.dtype)


def _integers(draws: Tensor, count: int) -> Tensor:
    """Whole numbers of 0 .. count - 1 from numbers in [0, 1); float64, where no product is rounded up to count."""
    return (draws.double() * count).long()


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
"""By the names of d_input.augment."""
