"""The calls into csrc/ behind kernels/pixel_major.py, by the dtype of the activations: what each layer computes.

Legend and layouts as there; a weight here is its memory, (C_s, 4, 4, C_l) float32 contiguous.  All tensors are
contiguous, results newly made.  Errors: MemoryError where C finds none for its scratch space.
"""

from __future__ import annotations

import math
from ctypes import c_double as _double
from ctypes import c_float as _float
from ctypes import c_size_t as _size
from typing import Any

import torch
from torch import Tensor

from kernels.native import library, pointer

_PARTS = {torch.bfloat16: 16, torch.float32: 36}
"""What a packed weight of 4 x 4 taps holds for each pair of channels: the taps, or winograd.c's sums of them."""
_COLUMNS = 64
"""Numbers of an image under a pixel, and what fills them up: at most so many."""


def _function(dtype: torch.dtype, name: str) -> Any:
    return getattr(library(dtype), ("dcgan32_" if dtype == torch.float32 else "dcgan_") + name)


def _run(dtype: torch.dtype, name: str, *arguments: Any) -> None:
    """Call what says by a number other than 0 that it found no memory."""
    if _function(dtype, name)(*arguments):
        raise MemoryError("no memory for the scratch space of a convolution")


def down(large: Tensor, weight: Tensor) -> Tensor:
    """The convolution: (2H, 2W, N, C_l) -> (H, W, N, C_s)."""
    (height, width, n, cl), cs, dtype = large.shape, weight.shape[0], large.dtype
    packed = large.new_empty(_PARTS[dtype] * cs * cl)
    small = large.new_empty(height // 2, width // 2, n, cs)
    _function(dtype, "pack_down")(pointer(weight), pointer(packed), cs, cl)
    _run(dtype, "down", *map(pointer, (large, packed, small)), height // 2, width // 2, n, cs, cl)
    return small


def up(small: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution: (H, W, N, C_s) -> (2H, 2W, N, C_l)."""
    (height, width, n, cs), cl, dtype = small.shape, weight.shape[3], small.dtype
    packed = small.new_empty(_PARTS[dtype] * cs * cl)
    large = small.new_empty(2 * height, 2 * width, n, cl)
    _function(dtype, "pack_up")(pointer(weight), pointer(packed), cs, cl)
    _run(dtype, "up", *map(pointer, (small, packed, large)), height, width, n, cs, cl)
    return large


def grad(small: Tensor, large: Tensor) -> Tensor:
    """The weight's gradient of either: (C_s, 4, 4, C_l)."""
    (height, width, n, cs), cl, dtype = small.shape, large.shape[3], small.dtype
    found = torch.empty(cs, 4, 4, cl)
    sizes = height, width, n, cs, cl
    if dtype == torch.float32:
        sums = torch.empty(_PARTS[dtype] * cs * cl)
        _run(dtype, "grad", *map(pointer, (small, large, found, sums)), *sizes)
        return found
    padded = math.ceil(n / 32) * 32
    transposed = small.new_empty(height * width * padded * cs)
    pairs = small.new_empty(4 * height * width * padded * cl)
    _function(dtype, "pack_transposed")(pointer(small), pointer(transposed), height * width, n, cs)
    _function(dtype, "pack_pairs")(pointer(large), pointer(pairs), 4 * height * width, n, cl)
    _function(dtype, "grad")(*map(pointer, (transposed, pairs, found)), *sizes)
    return found


def image_down(images: Tensor, weight: Tensor, slope: float) -> Tensor:
    """The convolution of images (N, 2H, 2W, C), then a leaky ReLU of this slope (1: none): (H, W, N, C_s)."""
    (n, height, width, c), cs, dtype = images.shape, weight.shape[0], images.dtype
    packed = images.new_empty(cs * _COLUMNS)
    out = images.new_empty(height // 2, width // 2, n, cs)
    _function(dtype, "image_pack_down")(pointer(weight), pointer(packed), cs, c)
    tensors = map(pointer, (images, packed, out))
    _run(dtype, "image_down", *tensors, _float(slope), height // 2, width // 2, n, cs, c)
    return out


def image_up(small: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution to images: (H, W, N, C_s) -> (N, 2H, 2W, C)."""
    (height, width, n, cs), c, dtype = small.shape, weight.shape[3], small.dtype
    packed = small.new_empty(cs * (_COLUMNS if dtype == torch.float32 else 16 * 16))
    images = small.new_empty(n, 2 * height, 2 * width, c)
    _function(dtype, "image_pack_up")(pointer(weight), pointer(packed), cs, c)
    _run(dtype, "image_up", *map(pointer, (small, packed, images)), height, width, n, cs, c)
    return images


def image_grad(small: Tensor, images: Tensor) -> Tensor:
    """The weight's gradient of either: (C_s, 4, 4, C)."""
    (height, width, n, cs), c = small.shape, images.shape[3]
    found, partial = torch.empty(cs, 4, 4, c), torch.empty(height * cs * _COLUMNS)
    _run(small.dtype, "image_grad", *map(pointer, (small, images, found, partial)), height, width, n, cs, c)
    return found


def leaky_backward(y: Tensor, dy: Tensor, slope: float) -> Tensor:
    """The gradient before a leaky ReLU from its output and the gradient after it, of one shape."""
    dx = torch.empty_like(y)
    _function(y.dtype, "leaky_backward")(*map(pointer, (y, dy, dx)), _float(slope), _size(y.numel()))
    return dx


def batchnorm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm and a leaky ReLU of (H, W, N, C): the output, mean and 1 / deviation (groups, C) float32."""
    height, width, n, c = x.shape
    y, mean, rstd = torch.empty_like(x), torch.empty(num_groups, c), torch.empty(num_groups, c)
    partial = torch.empty(height * width * num_groups * 2 * c)
    _function(x.dtype, "batchnorm_forward")(
        *map(pointer, (x, y, weight, bias, mean, rstd, running_mean, running_var, partial)),
        _double(momentum), _double(eps), _float(slope), height * width, n, c, num_groups,
    )  # fmt: skip
    return y, mean, rstd


def batchnorm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, slope: float, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    height, width, n, c = x.shape
    dx, d_weight, d_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    partial, means = torch.empty(height * width * num_groups * 2 * c), torch.empty(num_groups * 2 * c)
    _function(x.dtype, "batchnorm_backward")(
        *map(pointer, (x, dy, dx, weight, bias, mean, rstd, d_weight, d_bias, partial, means)),
        _float(slope), height * width, n, c, num_groups,
    )  # fmt: skip
    return dx, d_weight, d_bias
