"""The layers of DCGAN on a CPU over activations (H, W, N, C), the images of a pixel side by side: in bf16 or float32.

Why this order of memory, and how the arithmetic is done, stands in csrc/; here is what torch's autograd sees.  Images
go in and come out as everywhere else, (N, C, H, W) in channels-last; weights and their gradients are float32 with the
channels innermost, as parameters of a channels-last network are.  Sums are float32; what is stored is rounded once.
Results do not depend on the number of threads.  Which kernels compute is the activations' dtype: `native.load` has to
have made those ready.

Every operation has a `_reference` beside it, in plain PyTorch, any float dtype: the definition that it is tested
against.  No operation has a second derivative.

Legend: N images, in bf16 divisible by 16; H x W pixels; C_s and C_l channels of the small and of the large picture
that a convolution 4x4, stride 2, padding 1 joins, divisible by 32; C channels of an image, 1 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from kernels import native_layers

IMAGES = {torch.bfloat16: 16, torch.float32: 1}
"""A batch must be divisible by this."""
CHANNELS = 32
"""And every number of channels but the image's by this."""


def to_images(x: Tensor) -> Tensor:
    """(H, W, N, C) as (N, C, H, W): a view."""
    return x.permute(2, 3, 0, 1)


def from_images(x: Tensor) -> Tensor:
    """(N, C, H, W) as (H, W, N, C), contiguous."""
    return x.permute(2, 3, 0, 1).contiguous()


def conv_reference(large: Tensor, weight: Tensor) -> Tensor:
    """The definition of `conv`."""
    return from_images(F.conv2d(to_images(large), weight, stride=2, padding=1))


def conv_transpose_reference(small: Tensor, weight: Tensor) -> Tensor:
    """The definition of `conv_transpose`."""
    return from_images(F.conv_transpose2d(to_images(small), weight, stride=2, padding=1))


def image_conv_reference(images: Tensor, weight: Tensor, slope: float) -> Tensor:
    """The definition of `image_conv`."""
    return from_images(F.leaky_relu(F.conv2d(images, weight, stride=2, padding=1), slope))


def image_conv_transpose_reference(small: Tensor, weight: Tensor) -> Tensor:
    """The definition of `image_conv_transpose`."""
    return F.conv_transpose2d(to_images(small), weight, stride=2, padding=1)


def batchnorm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    slope: float,
    num_groups: int = 1,
) -> Tensor:
    """The definition of `batchnorm_act`: one batch after the other through torch's own layers."""
    parts = [
        F.leaky_relu(F.batch_norm(to_images(part), running_mean, running_var, weight, bias, True, momentum, eps), slope)
        for part in x.chunk(num_groups, dim=2)
    ]
    return torch.cat([from_images(part) for part in parts], dim=2)


def _weight_memory(weight: Tensor) -> Tensor:
    """(C_s, C_l, 4, 4) float32 as (C_s, 4, 4, C_l) contiguous: a view of a channels-last parameter."""
    assert weight.dtype == torch.float32, weight.dtype
    assert weight.shape[2:] == (4, 4), weight.shape
    return weight.permute(0, 2, 3, 1).contiguous()


def _as_weight(memory: Tensor) -> Tensor:
    return memory.permute(0, 3, 1, 2)


def _check(x: Tensor, *channels: int) -> None:
    assert x.dtype in IMAGES, x.dtype
    assert x.is_contiguous(), x.stride()
    assert x.shape[2] % IMAGES[x.dtype] == 0, x.shape
    assert all(c % CHANNELS == 0 for c in channels), channels


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, large: Tensor, weight: Tensor) -> Tensor:
        memory = _weight_memory(weight)
        ctx.save_for_backward(large, memory)
        return native_layers.down(large, memory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_small: Tensor) -> tuple[Tensor | None, Tensor | None]:
        large, memory = ctx.saved_tensors
        d_small = d_small.contiguous()
        d_large = native_layers.up(d_small, memory) if ctx.needs_input_grad[0] else None
        d_weight = _as_weight(native_layers.grad(d_small, large)) if ctx.needs_input_grad[1] else None
        return d_large, d_weight


class _ConvTranspose(Function):
    @staticmethod
    def forward(ctx: Any, small: Tensor, weight: Tensor) -> Tensor:
        memory = _weight_memory(weight)
        ctx.save_for_backward(small, memory)
        return native_layers.up(small, memory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_large: Tensor) -> tuple[Tensor | None, Tensor | None]:
        small, memory = ctx.saved_tensors
        d_large = d_large.contiguous()
        d_small = native_layers.down(d_large, memory) if ctx.needs_input_grad[0] else None
        d_weight = _as_weight(native_layers.grad(small, d_large)) if ctx.needs_input_grad[1] else None
        return d_small, d_weight


def conv(large: Tensor, weight: Tensor) -> Tensor:
    """Convolution 4x4, stride 2, padding 1.

    Args:
        large: (2H, 2W, N, C_l) bf16 or float32.
        weight: (C_s, C_l, 4, 4) float32.

    Returns:
        (H, W, N, C_s) bf16 or float32.
    """
    _check(large, *weight.shape[:2])
    return _Conv.apply(large, weight)


def conv_transpose(small: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution 4x4, stride 2, padding 1.

    Args:
        small: (H, W, N, C_s) bf16 or float32.
        weight: (C_s, C_l, 4, 4) float32.

    Returns:
        (2H, 2W, N, C_l) bf16 or float32.
    """
    _check(small, *weight.shape[:2])
    return _ConvTranspose.apply(small, weight)


def _image_memory(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C) contiguous: a view of channels-last images."""
    assert images.dtype in IMAGES, images.dtype
    return images.permute(0, 2, 3, 1).contiguous()


class _ImageConv(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, slope: float) -> Tensor:
        memory, weight_memory = _image_memory(images), _weight_memory(weight)
        out = native_layers.image_down(memory, weight_memory, slope)
        ctx.save_for_backward(memory, weight_memory, out)
        ctx.slope = slope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight, out = ctx.saved_tensors
        d_sum = native_layers.leaky_backward(out, d_out.contiguous(), ctx.slope)
        d_images = native_layers.image_up(d_sum, weight).permute(0, 3, 1, 2) if ctx.needs_input_grad[0] else None
        d_weight = _as_weight(native_layers.image_grad(d_sum, images)) if ctx.needs_input_grad[1] else None
        return d_images, d_weight, None


class _ImageConvTranspose(Function):
    @staticmethod
    def forward(ctx: Any, small: Tensor, weight: Tensor) -> Tensor:
        memory = _weight_memory(weight)
        ctx.save_for_backward(small, memory)
        return native_layers.image_up(small, memory).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        small, weight = ctx.saved_tensors
        memory = _image_memory(d_images)
        d_small = native_layers.image_down(memory, weight, 1.0) if ctx.needs_input_grad[0] else None
        d_weight = _as_weight(native_layers.image_grad(small, memory)) if ctx.needs_input_grad[1] else None
        return d_small, d_weight


def image_conv(images: Tensor, weight: Tensor, slope: float) -> Tensor:
    """Convolution 4x4, stride 2, padding 1 of images, then a leaky ReLU.

    Args:
        images: (N, C, 2H, 2W) bf16 or float32, best in channels-last.
        weight: (C_s, C, 4, 4) float32.
        slope: of the leaky ReLU, above 0.

    Returns:
        (H, W, N, C_s) bf16 or float32.
    """
    assert slope > 0, slope  # the backward pass reads the sign off the output
    assert images.shape[0] % IMAGES[images.dtype] == 0, images.shape
    assert images.shape[1] <= 4, images.shape
    assert weight.shape[0] % CHANNELS == 0, weight.shape
    return _ImageConv.apply(images, weight, slope)


def image_conv_transpose(small: Tensor, weight: Tensor) -> Tensor:
    """Transposed convolution 4x4, stride 2, padding 1 to images.

    Args:
        small: (H, W, N, C_s) bf16 or float32.
        weight: (C_s, C, 4, 4) float32.

    Returns:
        (N, C, 2H, 2W) bf16 or float32, channels-last.
    """
    _check(small, weight.shape[0])
    assert weight.shape[1] <= 4, weight.shape
    return _ImageConvTranspose.apply(small, weight)


class _BatchNormAct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        y, mean, rstd = native_layers.batchnorm_forward(x, weight, bias, *settings)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        *_, ctx.slope, ctx.num_groups = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, d_weight, d_bias = native_layers.batchnorm_backward(
            x, weight, bias, mean, rstd, dy.contiguous(), ctx.slope, ctx.num_groups
        )
        return dx, d_weight, d_bias, None, None, None, None, None, None


def batchnorm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
    num_groups: int = 1,
) -> Tensor:
    """BatchNorm by the batch's own statistics, then a leaky ReLU (slope 0: a ReLU).

    Args:
        x: (H, W, N, C) bf16 or float32.
        weight, bias: (C) float32.
        running_mean, running_var: (C) float32, moved in place as torch.nn.BatchNorm2d moves them, for one group of
            images after the other; None: there are none.
        momentum, eps: as torch.nn.BatchNorm2d's.
        num_groups: equal consecutive parts of N, each normalised by its own statistics.

    Returns:
        (H, W, N, C) bf16 or float32.
    """
    _check(x, x.shape[3])
    assert x.shape[2] % num_groups == 0, (x.shape, num_groups)
    assert x.dtype == torch.float32 or x.shape[2] // num_groups % 2 == 0, (x.shape, num_groups)
    return _BatchNormAct.apply(x, weight, bias, running_mean, running_var, momentum, eps, slope, num_groups)
