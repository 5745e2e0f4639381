"""From decoded images in memory to a batch as a network reads it: rows picked, cropped, mirrored and normalised.

    out[n, c, y, x] = images[rows[n], top[n] + y, left[n] + (W - 1 - x if flip[n] else x), c] / 127.5 - 1

Computed in float32 and rounded once, as kernels/normalize.py does, so that a batch from the cache is the batch that a
decoder would have made.  A pixel's byte is read once and its value written once: 1 + 2 bytes in bf16.  In torch, index,
flip and normalisation apart, it is 1 + 1, 1 + 1 and, in float32, 1 + 4, 4 + 4, 4 + 4 and 4 + 2.

Legend: M images in memory of S x T pixels, N of a batch of H x W pixels, C channels.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels import native
from kernels.language import FOUR_WARPS, INTERPRETED, cdiv, jit, tl
from kernels.normalize import normalize, normalize_reference

_BLOCK = 1024
"""Values of a program: 8 a thread, so that bf16 is written 16 bytes at a time."""


def gather_reference(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition.  Slow, obvious; what follows is tested against it."""
    return normalize_reference(_picked(images, rows, flip, top, left, height, width), dtype)


def _picked(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """(N, H, W, C) uint8."""
    if flip is None and top is None and left is None and images.shape[1:3] == (height, width):
        return images.index_select(0, rows)
    y = torch.arange(height, device=images.device)[None, :]
    x = torch.arange(width, device=images.device)[None, :]
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    y = y if top is None else y + top[:, None]
    x = x if left is None else x + left[:, None]
    return images[rows[:, None, None], y[:, :, None], x[:, None, :]]


@jit
def _gather_kernel(
    images_ptr, rows_ptr, flip_ptr, top_ptr, left_ptr, out_ptr, image_height, image_width, height, width,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # int32 overflows at 2^31 bytes
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < height * width * C
    c, pixel = at % C, at // C
    y, x = pixel // width, pixel % width
    if flip_ptr is not None:
        x = tl.where(tl.load(flip_ptr + n) != 0, width - 1 - x, x)
    if top_ptr is not None:
        y += tl.load(top_ptr + n).to(tl.int32)
    if left_ptr is not None:
        x += tl.load(left_ptr + n).to(tl.int32)
    start = tl.load(rows_ptr + n) * image_height * image_width * C
    value = tl.load(images_ptr + start + (y * image_width + x) * C + c, mask, other=0).to(tl.float32)
    # The exact quotient: the plain operator is up to two units off on a GPU.
    out = tl.div_rn(value, tl.full([BLOCK], 127.5, tl.float32)) - 1.0
    tl.store(out_ptr + n * height * width * C + at, out.to(out_ptr.dtype.element_ty), mask)


def _empty(images: Tensor, rows: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = len(rows), height, width, images.shape[3]
    return torch.empty(shape, dtype=dtype, device=images.device).permute(0, 3, 1, 2)


def _gather_triton(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    out = _empty(images, rows, height, width, dtype)
    grid = (len(rows), cdiv(height * width * images.shape[3], _BLOCK))
    sides = (images.shape[1], images.shape[2], height, width)
    flip = None if flip is None else flip.view(torch.uint8)
    _gather_kernel[grid](images, rows, flip, top, left, out, *sides, C=images.shape[3], BLOCK=_BLOCK, **FOUR_WARPS)
    return out


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """(256,) what each byte becomes."""
    return normalize_reference(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), dtype).reshape(256)


def _gather_native(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    assert images.shape[3] <= 64, images.shape  # whole pixels in a register
    memory = torch.empty(len(rows), height, width, images.shape[3], dtype=dtype)
    call = native.library().dcgan_gather_16 if dtype.itemsize == 2 else native.library().dcgan_gather_32
    flip = None if flip is None else flip.view(torch.uint8)
    places = [None if each is None else each.contiguous() for each in (rows, flip, top, left)]
    call(*map(native.pointer, (images, *places, _table(dtype), memory)),
         len(rows), images.shape[1], images.shape[2], height, width, images.shape[3])  # fmt: skip
    return memory.permute(0, 3, 1, 2)


def _gather_on_cpu(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    if INTERPRETED:
        return _gather_triton(images, rows, flip, top, left, height, width, dtype)
    if native.loaded() and dtype.itemsize in (2, 4):
        return _gather_native(images, rows, flip, top, left, height, width, dtype)
    return normalize(_picked(images, rows, flip, top, left, height, width), dtype)


_gather = torch.library.custom_op("dcgan::gather", _gather_on_cpu, mutates_args=(), device_types="cpu")
_gather.register_kernel("cuda")(_gather_triton)


@_gather.register_fake
def _(
    images: Tensor,
    rows: Tensor,
    flip: Tensor | None,
    top: Tensor | None,
    left: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return _empty(images, rows, height, width, dtype)


def gather(
    images: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    *,
    flip: Tensor | None = None,
    top: Tensor | None = None,
    left: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """A batch in [-1, 1] out of decoded images.

    Nothing waits for the device, so nobody looks whether rows and offsets lie within the images: on a GPU, and in the
    C kernel, others read foreign memory.

    Args:
        images: (M, S, T, C) uint8, contiguous.
        rows: (N,) int64, in 0 .. M - 1, on the images' device, as all that follows.
        dtype: of the result; any floating point.
        flip: (N,) bool: mirrored left to right, within the crop; None: none is.
        top, left: (N,) int64: where the crop begins; None: 0.
        size: (H, W) of the crop; None: S x T.

    Returns:
        (N, C, H, W) channels-last of that dtype.
    """
    assert images.dtype == torch.uint8, images.dtype
    assert images.dim() == 4, images.shape
    assert images.is_contiguous(), images.stride()
    assert rows.dtype == torch.int64, rows.dtype
    assert flip is None or (flip.dtype == torch.bool and flip.shape == rows.shape), flip.shape
    for places in (top, left):
        assert places is None or (places.dtype == torch.int64 and places.shape == rows.shape), places.shape
    height, width = size or (images.shape[1], images.shape[2])
    assert height <= images.shape[1], (height, images.shape)
    assert width <= images.shape[2], (width, images.shape)
    # A registered operator costs as much as 10 images, more where a step has just had the caches to itself.
    through_operator = images.device.type != "cpu" or torch.compiler.is_compiling()
    take = _gather if through_operator else _gather_on_cpu
    return take(images, rows, flip, top, left, height, width, dtype)
