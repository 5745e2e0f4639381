"""Pictures on disk: grids as PNG, walks as GIF, each whole or not there at all.

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.files import written_aside

GAP = 2
"""Pixels between two pictures of a grid."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(images: Tensor) -> Tensor:
    """Pixels as a screen wants them: -1 becomes 0, 1 becomes 255, rounded, clamped.

    Args:
        images: (N, C, H, W), any float dtype, memory format and device.  NaN becomes mid-gray, so that a diverged
            model still has a picture.

    Returns:
        (N, H, W, C) uint8, contiguous, on the same device.
    """
    levels = images.float().nan_to_num(nan=0.0).add(1.0).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """One picture of (H, W, C) uint8, C of 1, 3 or 4, as a Pillow image."""
    height, width, channels = pixels.shape
    assert channels in MODES, f"1, 3 or 4 channels, got {channels}"
    return Image.frombytes(MODES[channels], (width, height), pixels.cpu().contiguous().numpy().tobytes())


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of a near-square grid: ceil(sqrt(count)) columns, as many rows as that needs."""
    columns = math.isqrt(count - 1) + 1
    return -(-count // columns), columns


def grid(images: Tensor, columns: int = 0) -> Image.Image:
    """All pictures in one, row by row, with 2 pixels between them.

    Args:
        images: (N, H, W, C) uint8, N at least 1, C of 1, 3 or 4.
        columns: pictures in a row; 0: ceil(sqrt(N)).

    Returns:
        One picture.  Gaps and places left over are white; where C is 4, transparent.
    """
    count, height, width, channels = images.shape
    columns = columns or grid_shape(count)[1]
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, dtype=torch.uint8)
    if channels == 4:
        canvas[..., 3] = 0
    for i, pixels in enumerate(images.cpu()):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = pixels
    return to_image(canvas)


def save_png(image: Image.Image, path: Path) -> None:
    """A PNG under its name, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    with written_aside(path) as aside:
        image.save(aside, format="PNG")


def save_gif(frames: Sequence[Image.Image], path: Path, ms: int) -> None:
    """A GIF that repeats for ever, whole or not at all.

    All frames share the 256 colours that suit them best together: a palette of its own for each would make what
    stands still flicker.

    Args:
        frames: at least one, all of one size.
        ms: milliseconds a frame is shown; GIF counts in steps of 10.

    Raises:
        StorageError: the disk refused.
    """
    opaque = [_on_white(frame) for frame in frames]
    chosen = opaque[:: max(1, len(opaque) // 8)]
    montage = Image.new("RGB", (opaque[0].width, opaque[0].height * len(chosen)))
    for i, frame in enumerate(chosen):
        montage.paste(frame, (0, i * frame.height))
    palette = montage.quantize(256, method=Image.Quantize.MEDIANCUT)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in opaque]
    with written_aside(path) as aside:
        first.save(aside, format="GIF", save_all=True, append_images=others, duration=ms, loop=0, optimize=False)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
