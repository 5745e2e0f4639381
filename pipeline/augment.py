"""Random crop, mirror and colour jitter: the same for every decoder and for the cache.

Each parameter is a function of (seed, image number), so that neither resuming nor the number of ranks changes a
picture.  Order: crop, mirror, colour.  Colour is one affine map of (R, G, B), rounded and clamped to 0..255 once:

    rgb' = brightness * (contrast * T rgb + 128 (1 - contrast)),   T = YIQ^-1 turn(hue) scale(saturation) YIQ

which is the formula of DALI's color_twist.  A gray image has T = 1; alpha is left alone.

Legend: N images, H x W pixels, C channels (1, 3 or 4), m the crop margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.decode import Pixels
from pipeline.philox import Stream, uniform

MID_GRAY = 128.0
"""The value that contrast leaves alone."""

# Luma and two chroma axes of NTSC, rounded as in DALI's color_twist: its float output agrees to 1e-7 (2.4, 2026-11).
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])

YIQ_INVERSE = np.linalg.inv(YIQ)

_CHUNK = 8
"""Images whose float copy stays in a core's cache while colour is computed."""


@dataclass(frozen=True)
class Parameters:
    """What happens to each of N images; None where no image has it done.

    The colour factors are kept beside the map made of them, because DALI takes the factors.
    """

    flip: np.ndarray | None
    """(N,) bool: mirror left to right."""
    top: np.ndarray | None
    """(N,) int64 in 0..m: first row of the crop."""
    left: np.ndarray | None
    """(N,) int64 in 0..m: first column of the crop."""
    factors: np.ndarray | None
    """(N, 4) float64: brightness, contrast, saturation, hue in degrees."""

    def of(self, images: slice) -> Parameters:
        """Those of some of the images; nothing is copied."""
        mine = (None if p is None else p[images] for p in (self.flip, self.top, self.left, self.factors))
        return Parameters(*mine)

    def colour(self, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The affine map of each image: matrix (N, k, k) and offset (N, k), float32; k = 1 for gray, else 3."""
        if self.factors is None:
            return None
        brightness, contrast, saturation, hue = self.factors.T
        gain = (brightness * contrast)[:, None, None]
        offset = brightness * MID_GRAY * (1 - contrast)
        if channels == 1:
            return gain.astype(np.float32), offset[:, None].astype(np.float32)
        angle = np.deg2rad(hue)
        turn = np.zeros((len(hue), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle) * saturation
        turn[:, 1, 2] = np.sin(angle) * saturation
        turn[:, 2, 1] = -turn[:, 1, 2]
        matrix = gain * (YIQ_INVERSE @ turn @ YIQ)
        return matrix.astype(np.float32), np.repeat(offset[:, None], 3, axis=1).astype(np.float32)


def parameters(cfg: DataConfig, seed: int, numbers: np.ndarray) -> Parameters:
    """The augmentation of image numbers (N,) of a run.

    One setting never changes another's draw: switching the flip off leaves the crops as they were.
    """
    flip = top = left = factors = None
    if cfg.flip or cfg.crop_margin:
        place = uniform(seed, Stream.AUGMENT, numbers, lane=0)
        if cfg.flip:
            flip = place[:, 0] < 0.5
        if cfg.crop_margin:
            top, left = (place[:, 1:3] * (cfg.crop_margin + 1)).astype(np.int64).T
    spread = np.array([cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue])
    if spread.any():
        signed = 2 * uniform(seed, Stream.AUGMENT, numbers, lane=1) - 1
        factors = signed * spread + np.array([1.0, 1.0, 1.0, 0.0])
    return Parameters(flip, top, left, factors)


def _recolour(pixels: Any, matrix: Any, offset: Any) -> list[Any]:
    """The colour planes of pixels (N, H, W, C) under the map, float32, neither rounded nor clamped.

    Separate products and sums, each correctly rounded: every machine gets the same bits, whatever the batch size.  A
    fused multiply-add, a matrix product or TF32 would not promise that.  NumPy and torch alike.
    """
    k = matrix.shape[-1]
    column = (slice(None), None, None)
    mapped = []
    for row in range(k):
        plane = pixels[..., 0] * matrix[:, row, 0][column]
        for c in range(1, k):
            plane += pixels[..., c] * matrix[:, row, c][column]
        plane += offset[:, row][column]
        mapped.append(plane)
    return mapped


def apply(windows: Tensor, params: Parameters, size: tuple[int, int]) -> Tensor:
    """Crop, mirror and recolour windows on their device.

    Args:
        windows: (N, H + m, W + m, C) uint8, contiguous; not changed.
        size: (H, W).

    Returns:
        (N, H, W, C) uint8, contiguous; `windows` itself where there is nothing to do.
    """
    if windows.device.type == "cpu":
        return torch.from_numpy(apply_numpy(windows.numpy(), params, size))
    items = torch.arange(len(windows), device=windows.device)
    return take_device(windows, items, params, size)


def apply_numpy(windows: Pixels, params: Parameters, size: tuple[int, int]) -> Pixels:
    """apply() on the CPU.  NumPy, because torch would start a second team of threads beside the training's."""
    return take_numpy(windows, None, params, size)


def take_numpy(
    source: Pixels, items: np.ndarray | None, params: Parameters, size: tuple[int, int], out: Pixels | None = None
) -> Pixels:
    """Rows `items` of source, cropped, mirrored and recoloured, each pixel copied once before its colour.

    Args:
        source: (M, H + m, W + m, C) uint8, for example a memory map.
        items: (N,) rows; None: all.
        out: (N, H, W, C) uint8 to write to.

    Returns:
        out, or a fresh array; source itself where there is nothing to do.
    """
    height, width = size
    count = len(source) if items is None else len(items)
    if items is None and out is None and params.flip is None and source.shape[1:3] == size:
        done = source
    else:
        done = np.empty((count, height, width, source.shape[3]), np.uint8) if out is None else out
        _copy(source, items, params, done)
    colour = params.colour(source.shape[3])
    if colour is not None:
        done = done.copy() if done is source else done
        matrix, offset = colour
        for i in range(0, count, _CHUNK):
            part = slice(i, i + _CHUNK)
            planes = _recolour(done[part].astype(np.float32), matrix[part], offset[part])
            for c, plane in enumerate(planes):
                done[part, ..., c] = np.clip(np.rint(plane, out=plane), 0, 255, out=plane)
    return done


def _copy(source: Pixels, items: np.ndarray | None, params: Parameters, out: Pixels) -> None:
    count, height, width, channels = out.shape
    if params.flip is None and source.shape[1:3] == (height, width):
        if items is None:
            out[...] = source
        else:
            np.take(source, items, axis=0, out=out, mode="clip")  # any other mode buffers the whole output
        return
    # A pixel as one item of C bytes: mirroring then moves whole pixels, twice as fast as bytes.
    pixel = np.dtype((np.void, channels))
    src, dst = source.view(pixel)[..., 0], out.view(pixel)[..., 0]
    rows = range(count) if items is None else items.tolist()
    zero = [0] * count
    tops, lefts = (zero if p is None else p.tolist() for p in (params.top, params.left))
    flips = [False] * count if params.flip is None else params.flip.tolist()
    for i, (row, top, left, flip) in enumerate(zip(rows, tops, lefts, flips, strict=True)):
        cut = src[row, top : top + height, left : left + width]
        dst[i] = cut[:, ::-1] if flip else cut


@dataclass(frozen=True)
class Places:
    """Where each of N images is cut out and whether it is mirrored, on the device; None as in Parameters."""

    rows: Tensor
    """(N,) int64."""
    flip: Tensor | None
    """(N,) bool."""
    top: Tensor | None
    left: Tensor | None
    """(N,) int64."""


NUM_PLACES = 4


def pack_places(items: np.ndarray, params: Parameters, out: np.ndarray) -> None:
    """Write what Places holds into one piece of memory, (NUM_PLACES, N) int64, so that one copy brings it to a GPU."""
    for row, values in zip(out, (items, params.flip, params.top, params.left), strict=True):
        if values is not None:
            row[:] = values


def unpack_places(packed: Tensor, params: Parameters) -> Places:
    """The Places in a copy of what pack_places wrote."""
    rows, flip, top, left = packed
    return Places(
        rows,
        None if params.flip is None else flip.bool(),
        None if params.top is None else top,
        None if params.left is None else left,
    )


def take_device(
    source: Tensor, items: Tensor, params: Parameters, size: tuple[int, int], places: Places | None = None
) -> Tensor:
    """take_numpy in torch: one gather for rows, crop and mirror together, on the device of source.

    Args:
        source: (M, H + m, W + m, C) uint8.
        items: (N,) int64 on that device.
        places: items and params' places where they lie on the device already.

    Returns:
        (N, H, W, C) uint8, contiguous.
    """
    device = source.device

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    height, width = size
    if places is None:
        flip, top, left = (None if p is None else there(p) for p in (params.flip, params.top, params.left))
        places = Places(items, flip, top, left)
    if places.flip is None and places.top is None:
        done = source.index_select(0, items)
    else:
        y = torch.arange(height, device=device)[None, :]
        x = torch.arange(width, device=device)[None, :]
        if places.flip is not None:
            x = torch.where(places.flip[:, None], width - 1 - x, x)
        if places.top is not None and places.left is not None:
            y, x = y + places.top[:, None], x + places.left[:, None]
        done = source[items[:, None, None], y[:, :, None], x[:, None, :]]
    colour = params.colour(source.shape[3])
    if colour is not None:
        planes = _recolour(done.float(), there(colour[0]), there(colour[1]))
        for c, plane in enumerate(planes):
            done[..., c] = plane.round_().clamp_(0, 255)
    return done
