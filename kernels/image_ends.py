"""The layers at the images: D's first convolution with LeakyReLU, G's last transposed one with tanh; 4x4, stride 2.

    D:  f = leaky_relu(conv2d(p, weight, stride=2, padding=1), slope)
    G:  p = tanh(conv_transpose2d(f, weight, stride=2, padding=1))

The narrow side p has 1 to 4 channels, the wide side f as many as the network is wide.  Both weights are (O, C, 4, 4),
and what one layer does forward the other does backward, so three kernels are enough, each with the activation, or its
derivative, where it reads or writes:

    down     f from p: D forward; G's gradient in f, with tanh's derivative 1 - p^2 on the way in
    up       p from f: G forward; D's gradient in p, with LeakyReLU's derivative on the way in, from the sign of f
    weight   the gradient of either weight

KB an image at 64 x 64 x 3 and 64 wide in bf16 (p 25, f 131), convolution and activation apart, then here:

    D forward 418, 156;  D weight 549, 287;  D input 549, 287;  G forward 205, 156;  G backward 385, 360

An activation's kernel alone would save none of it: torch's in place moves the same bytes.  As matrix products: D's has
16 C (padded to 64) terms a sum; G's makes the 2 x 2 pixels of C channels over a place of f at once, out of the 3 x 3
places around it: 64 x 16 x 576 a program, three times the arithmetic that is needed, and still 1 % of a step's.

Legend: N images, C channels of the narrow side (P: padded to a power of two), O of the wide side, h x w its pixels,
M = N h w its places, K = 16 P terms under a place.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kernels.language import FOUR_WARPS, INTERPRETED, SM_PROGRAMS, TRITON_DTYPES, cdiv, jit, power_of_two, tl

_BLOCK_M = 64
"""Places of a program: the rows of a warp group's product on Hopper."""


def conv_leaky_relu_reference(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    """The definition of D's first layer.  Slow, obvious, differentiable; the kernels are tested against it."""
    return F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), slope)


def conv_transpose_tanh_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition of G's last layer."""
    return torch.tanh(F.conv_transpose2d(x, weight, stride=2, padding=1))


@jit
def _patches(p_ptr, tanh_ptr, m, places, h, w, C: tl.constexpr, P: tl.constexpr):
    """(M, K) of p: the 4 x 4 pixels under each place; times tanh's derivative where its outputs are given."""
    k = tl.arange(0, 16 * P)
    c, ky, kx = k % P, k // (4 * P), k // P % 4
    y = (m // w % h * 2 - 1)[:, None] + ky[None, :]
    x = (m % w * 2 - 1)[:, None] + kx[None, :]
    inside = (m < places)[:, None] & (y >= 0) & (y < 2 * h) & (x >= 0) & (x < 2 * w) & (c < C)[None, :]
    n = (m // (h * w)).to(tl.int64)  # int32 overflows at 2^31 elements
    at = ((n[:, None] * (2 * h) + y) * (2 * w) + x) * C + c[None, :]
    value = tl.load(p_ptr + at, inside, other=0.0)
    if tanh_ptr is not None:
        out = tl.load(tanh_ptr + at, inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * (1.0 - out * out)).to(p_ptr.dtype.element_ty)
    return value


@jit
def _features(f_ptr, relu_ptr, at, inside, slope):
    """f at these places; times LeakyReLU's derivative where its outputs are given."""
    value = tl.load(f_ptr + at, inside, other=0.0)
    if relu_ptr is not None:
        out = tl.load(relu_ptr + at, inside, other=0.0).to(tl.float32)
        wide = value.to(tl.float32)
        value = tl.where(out > 0, wide, wide * slope).to(f_ptr.dtype.element_ty)
    return value


@jit
def _down(
    p_ptr, tanh_ptr, weight_ptr, f_ptr, places, h, w, channels, strides, slope, C: tl.constexpr, P: tl.constexpr,
    ACTIVATE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, 16 * P)
    c, ky, kx = k % P, k // (4 * P), k // P % 4
    patches = _patches(p_ptr, tanh_ptr, m, places, h, w, C, P)
    at = (c * strides[1] + ky * strides[2] + kx * strides[3])[:, None] + o[None, :] * strides[0]
    weight = tl.load(weight_ptr + at, (c < C)[:, None] & (o < channels)[None, :], other=0.0).to(patches.dtype)
    f = tl.dot(patches.to(T), weight.to(T), input_precision=PRECISION)
    if ACTIVATE:
        f = tl.where(f > 0, f, f * slope)
    out = m.to(tl.int64)[:, None] * channels + o[None, :]
    tl.store(f_ptr + out, f.to(f_ptr.dtype.element_ty), (m < places)[:, None] & (o < channels)[None, :])


@jit
def _up(
    f_ptr, relu_ptr, weight_ptr, p_ptr, places, h, w, channels, strides, slope, C: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, ACTIVATE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, j = m // w % h, m % w
    n = (m // (h * w)).to(tl.int64)
    q = tl.arange(0, Q)  # pixel (py, px) of the 2 x 2, channel c
    c, py, px = q % P, q // (2 * P), q // P % 2
    known = (q < 4 * P) & (c < C)
    p = tl.zeros([BLOCK_M, Q], tl.float32)
    for tap in range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        ky, kx = py + 1 - 2 * dy, px + 1 - 2 * dx
        reached = known & (ky >= 0) & (ky < 4) & (kx >= 0) & (kx < 4)
        y, x = i + dy, j + dx
        inside = (m < places) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        place = (n * h + y) * w + x
        for first in range(0, channels, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            at = place[:, None] * channels + o[None, :]
            f = _features(f_ptr, relu_ptr, at, inside[:, None] & (o < channels)[None, :], slope)
            at = (c * strides[1] + ky * strides[2] + kx * strides[3])[None, :] + o[:, None] * strides[0]
            weight = tl.load(weight_ptr + at, reached[None, :] & (o < channels)[:, None], other=0.0).to(f.dtype)
            p += tl.dot(f.to(T), weight.to(T), input_precision=PRECISION)
    if ACTIVATE:  # tanh, by the exponential that does not overflow
        e = tl.exp(-2.0 * tl.abs(p))
        size = (1.0 - e) / (1.0 + e)
        p = tl.where(p < 0, -size, size)
    out = ((n[:, None] * (2 * h) + (2 * i[:, None] + py[None, :])) * (2 * w) + (2 * j[:, None] + px[None, :])) * C
    tl.store(p_ptr + out + c[None, :], p.to(p_ptr.dtype.element_ty), (m < places)[:, None] & known[None, :])


@jit
def _weight(
    p_ptr, tanh_ptr, f_ptr, relu_ptr, parts_ptr, places, slice_places, h, w, channels, slope, C: tl.constexpr,
    P: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """(K, O) of one slice of the places."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, 16 * P)
    start = tl.program_id(0) * slice_places
    end = tl.minimum(start + slice_places, places)
    total = tl.zeros([16 * P, BLOCK_O], tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        patches = _patches(p_ptr, tanh_ptr, m, end, h, w, C, P)
        at = m.to(tl.int64)[:, None] * channels + o[None, :]
        f = _features(f_ptr, relu_ptr, at, (m < end)[:, None] & (o < channels)[None, :], slope)
        total += tl.dot(tl.trans(patches.to(T)), f.to(T), input_precision=PRECISION)
    at = (tl.program_id(0) * (16 * P) + k)[:, None] * channels + o[None, :]
    tl.store(parts_ptr + at, total, (o < channels)[None, :] & (k >= 0)[:, None])


@jit
def _merge_weight(
    parts_ptr, out_ptr, slices, channels, strides, C: tl.constexpr, P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Slices added up, into the memory format of the weight."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o, k = e % channels, e // channels
    c, ky, kx = k % P, k // (4 * P), k // P % 4
    known = (k < 16 * P) & (c < C)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, slices, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = s[:, None] * (16 * P * channels) + e[None, :]
        total += tl.sum(tl.load(parts_ptr + at, (s < slices)[:, None] & known[None, :], other=0.0), 0)
    at = o * strides[0] + c * strides[1] + ky * strides[2] + kx * strides[3]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), known)


def _nhwc(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _settings(x: Tensor, weight: Tensor, h: int, w: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """M, h and w; what all three kernels are compiled for."""
    exact = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"  # of float32; the shorter types know one way only
    channels, narrow = weight.shape[:2]
    return (len(x) * h * w, h, w), {
        "C": narrow,
        "P": power_of_two(narrow),
        "PRECISION": exact,
        # The interpreter multiplies no bf16; products of two are exact in float32, as the hardware has them.
        "T": TRITON_DTYPES[torch.float32 if INTERPRETED else x.dtype],
        "BLOCK_M": _BLOCK_M,
        "BLOCK_O": min(64, max(16, power_of_two(channels))),
        **FOUR_WARPS,
    }


def _down_triton(p: Tensor, tanh: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    n, _, height, width = p.shape
    sizes, block = _settings(p, weight, height // 2, width // 2)
    channels = len(weight)
    f = _empty(p, n, channels, *sizes[1:])
    grid = (cdiv(sizes[0], _BLOCK_M), cdiv(channels, block["BLOCK_O"]))
    given = (_nhwc(p), _nhwc(tanh), weight, f)
    _down[grid](*given, *sizes, channels, weight.stride(), slope, ACTIVATE=activate, **block)
    return f


def _up_triton(f: Tensor, relu: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    n, channels, h, w = f.shape
    sizes, block = _settings(f, weight, h, w)
    p = _empty(f, n, weight.shape[1], 2 * h, 2 * w)
    given = (_nhwc(f), _nhwc(relu), weight, p)
    q = max(16, 4 * block["P"])
    grid = (cdiv(sizes[0], _BLOCK_M),)
    _up[grid](*given, *sizes, channels, weight.stride(), slope, Q=q, ACTIVATE=activate, **block)
    return p


def _weight_triton(
    p: Tensor, tanh: Tensor | None, f: Tensor, relu: Tensor | None, weight: Tensor, slope: float
) -> Tensor:
    _, channels, h, w = f.shape
    (places, *_), block = _settings(f, weight, h, w)
    blocks = cdiv(channels, block["BLOCK_O"])
    slice_places = cdiv(cdiv(places, _BLOCK_M), max(1, SM_PROGRAMS // (4 * blocks))) * _BLOCK_M
    slices = cdiv(places, slice_places)
    parts = torch.empty(slices, 16 * block["P"], channels, dtype=torch.float32, device=f.device)
    given = (_nhwc(p), _nhwc(tanh), _nhwc(f), _nhwc(relu), parts)
    _weight[slices, blocks](*given, places, slice_places, h, w, channels, slope, **block)
    out = torch.empty_like(weight)
    merge = {"C": block["C"], "P": block["P"], "BLOCK_S": min(64, power_of_two(slices)), "BLOCK": 64, **FOUR_WARPS}
    grid = (cdiv(16 * block["P"] * channels, 64),)
    _merge_weight[grid](parts, out, slices, channels, out.stride(), **merge)
    return out


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _through_tanh(dy: Tensor, y: Tensor | None) -> Tensor:
    return dy if y is None else dy * (1 - y * y)


def _through_leaky_relu(dy: Tensor, y: Tensor | None, slope: float) -> Tensor:
    return dy if y is None else torch.where(y > 0, dy, dy * slope)


@torch.library.custom_op("dcgan::image_end_down", mutates_args=(), device_types="cpu")
def _image_end_down(p: Tensor, tanh: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    """f from p.  tanh: the outputs through whose derivative p, a gradient, goes first.  activate: LeakyReLU after."""
    if INTERPRETED:
        return _down_triton(p, tanh, weight, activate, slope)
    f = F.conv2d(_through_tanh(p, tanh), weight.to(p.dtype), stride=2, padding=1)
    f = F.leaky_relu(f, slope) if activate else f
    return _empty(p, *f.shape).copy_(f)


@torch.library.custom_op("dcgan::image_end_up", mutates_args=(), device_types="cpu")
def _image_end_up(f: Tensor, relu: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    """p from f.  relu: the outputs through whose LeakyReLU's derivative f, a gradient, goes first.  activate: tanh."""
    if INTERPRETED:
        return _up_triton(f, relu, weight, activate, slope)
    p = F.conv_transpose2d(_through_leaky_relu(f, relu, slope), weight.to(f.dtype), stride=2, padding=1)
    p = torch.tanh(p) if activate else p
    return _empty(f, *p.shape).copy_(p)


@torch.library.custom_op("dcgan::image_end_weight", mutates_args=(), device_types="cpu")
def _image_end_weight(
    p: Tensor, tanh: Tensor | None, f: Tensor, relu: Tensor | None, weight: Tensor, slope: float
) -> Tensor:
    """The weight's gradient; either p or f is a gradient and goes through a derivative first."""
    if INTERPRETED:
        return _weight_triton(p, tanh, f, relu, weight, slope)
    narrow, wide = _through_tanh(p, tanh), _through_leaky_relu(f, relu, slope)
    gradient = conv2d_weight(narrow, list(weight.shape), wide, stride=2, padding=1)
    return torch.empty_like(weight).copy_(gradient)


_image_end_down.register_kernel("cuda")(_down_triton)
_image_end_up.register_kernel("cuda")(_up_triton)
_image_end_weight.register_kernel("cuda")(_weight_triton)


@_image_end_down.register_fake
def _(p: Tensor, tanh: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    return _empty(p, len(p), len(weight), p.shape[2] // 2, p.shape[3] // 2)


@_image_end_up.register_fake
def _(f: Tensor, relu: Tensor | None, weight: Tensor, activate: bool, slope: float) -> Tensor:
    return _empty(f, len(f), weight.shape[1], 2 * f.shape[2], 2 * f.shape[3])


@_image_end_weight.register_fake
def _(p: Tensor, tanh: Tensor | None, f: Tensor, relu: Tensor | None, weight: Tensor, slope: float) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, derivative_of, weight, activate, ctx.slope = inputs
    ctx.once = activate and derivative_of is None
    ctx.save_for_backward(x, weight, output)


def _down_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, y = _saved(ctx)
    needs_x, _, needs_weight, *_ = ctx.needs_input_grad
    dx = _image_end_up(dy, y, weight, False, ctx.slope) if needs_x else None
    dweight = _image_end_weight(x, None, dy, y, weight, ctx.slope) if needs_weight else None
    return dx, None, dweight, None, None


def _up_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, y = _saved(ctx)
    needs_x, _, needs_weight, *_ = ctx.needs_input_grad
    dx = _image_end_down(dy, y, weight, False, ctx.slope) if needs_x else None
    dweight = _image_end_weight(dy, y, x, None, weight, ctx.slope) if needs_weight else None
    return dx, None, dweight, None, None


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not ctx.once:
        raise RuntimeError("the layers of kernels/image_ends.py have no second derivative")
    return ctx.saved_tensors


_image_end_down.register_autograd(_down_gradient, setup_context=_keep)
_image_end_up.register_autograd(_up_gradient, setup_context=_keep)


def conv_leaky_relu(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    """D's first layer; once differentiable in x and weight.

    Args:
        x: (N, C, H, W), H and W even, C at most 4; under autocast taken in its type.
        weight: (O, C, 4, 4), any float dtype and memory format; multiplied in x's type, its gradient in its own.

    Returns:
        (N, O, H / 2, W / 2) channels-last, of x's dtype.  Not to be changed in place: backward reads its signs.
    """
    x = _as_autocast_has_it(x)
    assert weight.shape[1:] == (x.shape[1], 4, 4), (weight.shape, x.shape)
    assert x.shape[1] <= 4, x.shape
    assert x.shape[2] % 2 == 0, x.shape
    assert x.shape[3] % 2 == 0, x.shape
    return _image_end_down(x, None, weight, True, slope)


def conv_transpose_tanh(x: Tensor, weight: Tensor) -> Tensor:
    """G's last layer; once differentiable in x and weight.

    Args:
        x: (N, O, h, w); under autocast taken in its type.
        weight: (O, C, 4, 4), C at most 4, any float dtype and memory format.

    Returns:
        (N, C, 2 h, 2 w) channels-last, of x's dtype, in [-1, 1].  Not to be changed in place.
    """
    x = _as_autocast_has_it(x)
    assert weight.shape[0] == x.shape[1], (weight.shape, x.shape)
    assert weight.shape[2:] == (4, 4), weight.shape
    assert weight.shape[1] <= 4, weight.shape
    return _image_end_up(x, None, weight, True, 0.0)


def _as_autocast_has_it(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
