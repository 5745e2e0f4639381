"""BatchNorm of a training batch and (leaky) ReLU, in one reading of x each way.

    m, v = mean and biased variance over the rows of a group;  z = (x - m) / sqrt(v + eps) * weight + bias
    y = z where z > 0, else slope * z                                      (slope 0: ReLU)
    dz = dy where z > 0, else slope * dy;  dx = weight / sqrt(v + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))

x is (N, C, H, W) in channels-last memory: rows of C channels.  `num_groups` equal consecutive parts of the batch are
separate batches, as real and fake images are to a discriminator that sees them in one pass.

Passes over memory, b bytes an element: statistics read x, the output reads x and writes y (3b); backward reads dy and x
for the sums, then again for dx (5b).  Eager torch moves 5b (statistics, normalise, activate in place) and 8b.  Kept for
backward: x, m and v.  The sign of z is computed anew, so y may be thrown away or overwritten.

Sums are float32 (float64 for float64), in two stages without atomics, so equal inputs give equal bits.  Variances are
sums of squared distances from a tile's own mean, merged as Chan et al. 1979 have it: a mean far from zero costs no
digits.

Legend: N images, C channels, R rows (images times pixels) of one group, G groups, S slices of a group's rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.language import (
    FOUR_WARPS,
    INTERPRETED,
    SM_PROGRAMS,
    TRITON_DTYPES,
    cdiv,
    jit,
    power_of_two,
    tl,
    wide_dtype,
)

_TILE = 2048
"""Elements a program holds at once: 16 a thread with 4 warps."""


def batchnorm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    slope: float,
    num_groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The definition.  Slow, obvious, differentiable; what follows is tested against it."""
    parts = []
    for part in x.chunk(num_groups):
        normalised = F.batch_norm(part, running_mean, running_var, weight, bias, True, momentum, eps)
        parts.append(F.leaky_relu(normalised, slope))
        num_batches_tracked += 1
    return torch.cat(parts)


@jit
def _slice_moments(
    x_ptr, parts, rows, channels, slice_rows, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and summed squared distance from it of every channel, over one slice of one group's rows."""
    part, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * slice_rows
    end = tl.minimum(first + slice_rows, rows)
    base = group.to(tl.int64) * rows  # int32 overflows at 2^31 elements
    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    for start in range(first, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + (base + r)[:, None] * channels + c[None, :], mask, other=0.0).to(ACC)
        n = tl.minimum(end - start, BLOCK_R).to(ACC)
        before = (start - first).to(ACC)
        tile_mean = tl.sum(x, 0) / n
        distance = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        mean += delta * (n / (before + n))
        m2 += tl.sum(distance * distance, 0) + delta * delta * (before * n / (before + n))
    out = (group * tl.num_programs(0) + part) * channels + c
    tl.store(parts[0] + out, mean, c < channels)
    tl.store(parts[1] + out, m2, c < channels)


@jit
def _merge_moments(
    parts, moments, running, rows, channels, slices, slice_rows, groups, momentum, ACC: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slices to groups, for a few channels; then the running statistics, one group after the other."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    running_mean = tl.load(running[0] + c, in_c, other=0.0).to(ACC)
    running_var = tl.load(running[1] + c, in_c, other=0.0).to(ACC)
    for group in range(groups):
        total = tl.zeros([BLOCK_C], ACC)
        for start in range(0, slices, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = (s < slices)[:, None] & in_c[None, :]
            n = tl.minimum(slice_rows, rows - s * slice_rows).to(ACC)
            at = (group * slices + s)[:, None] * channels + c[None, :]
            total += tl.sum(tl.load(parts[0] + at, mask, other=0.0) * n[:, None], 0)
        mean = total / rows
        m2 = tl.zeros([BLOCK_C], ACC)
        for start in range(0, slices, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = (s < slices)[:, None] & in_c[None, :]
            n = tl.minimum(slice_rows, rows - s * slice_rows).to(ACC)
            at = (group * slices + s)[:, None] * channels + c[None, :]
            distance = tl.load(parts[0] + at, mask, other=0.0) - mean[None, :]
            inside = tl.load(parts[1] + at, mask, other=0.0)
            m2 += tl.sum(tl.where(mask, inside + n[:, None] * distance * distance, 0.0), 0)
        tl.store(moments[0] + group * channels + c, mean, in_c)
        tl.store(moments[1] + group * channels + c, m2 / rows, in_c)
        running_mean = running_mean * (1 - momentum) + mean * momentum
        running_var = running_var * (1 - momentum) + m2 / (rows - 1) * momentum
    tl.store(running[0] + c, running_mean, in_c)
    tl.store(running[1] + c, running_var, in_c)
    if tl.program_id(0) == 0:
        tl.store(running[2], tl.load(running[2]) + groups)


@jit
def _of_channels(given, group, c, channels, eps, ACC: tl.constexpr):
    """What the rows of a group share: mean, 1 / standard deviation, scale and shift of each channel."""
    weight_ptr, bias_ptr, mean_ptr, var_ptr = given
    mask = c < channels
    mean = tl.load(mean_ptr + group * channels + c, mask, other=0.0)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + group * channels + c, mask, other=0.0) + eps)
    scale = tl.load(weight_ptr + c, mask, other=0.0).to(ACC) * rstd
    bias = tl.load(bias_ptr + c, mask, other=0.0).to(ACC)
    return mean[None, :], rstd[None, :], scale[None, :], bias[None, :]


@jit
def _forward(
    x_ptr, y_ptr, given, rows, channels, slope, eps, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    mean, _, scale, bias = _of_channels(given, group, c, channels, eps, ACC)
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    at = (group.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    z = (tl.load(x_ptr + at, mask, other=0.0).to(ACC) - mean) * scale + bias
    tl.store(y_ptr + at, tl.where(z > 0, z, z * slope).to(y_ptr.dtype.element_ty), mask)


@jit
def _slice_sums(
    dy_ptr, x_ptr, given, parts, rows, channels, slice_rows, slope, eps, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * xhat over one slice of one group's rows."""
    part, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, scale, bias = _of_channels(given, group, c, channels, eps, ACC)
    first = part * slice_rows
    end = tl.minimum(first + slice_rows, rows)
    base = group.to(tl.int64) * rows
    sum_dz = tl.zeros([BLOCK_C], ACC)
    sum_dz_xhat = tl.zeros([BLOCK_C], ACC)
    for start in range(first, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & (c < channels)[None, :]
        at = (base + r)[:, None] * channels + c[None, :]
        centred = tl.load(x_ptr + at, mask, other=0.0).to(ACC) - mean
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(ACC)  # 0 outside, so these rows add nothing
        dz = tl.where(centred * scale + bias > 0, dy, dy * slope)
        sum_dz += tl.sum(dz, 0)
        sum_dz_xhat += tl.sum(dz * (centred * rstd), 0)
    out = (group * tl.num_programs(0) + part) * channels + c
    tl.store(parts[0] + out, sum_dz, c < channels)
    tl.store(parts[1] + out, sum_dz_xhat, c < channels)


@jit
def _merge_sums(
    parts, sums, gradients, channels, slices, groups, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Slices to groups, and groups to the gradients of bias and weight."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    for which in tl.static_range(2):
        whole = tl.zeros([BLOCK_C], ACC)
        for group in range(groups):
            total = tl.zeros([BLOCK_C], ACC)
            for start in range(0, slices, BLOCK_S):
                s = start + tl.arange(0, BLOCK_S)
                mask = (s < slices)[:, None] & (c < channels)[None, :]
                at = (group * slices + s)[:, None] * channels + c[None, :]
                total += tl.sum(tl.load(parts[which] + at, mask, other=0.0), 0)
            tl.store(sums[which] + group * channels + c, total, c < channels)
            whole += total
        tl.store(gradients[which] + c, whole.to(gradients[which].dtype.element_ty), c < channels)


@jit
def _backward(
    dy_ptr, x_ptr, dx_ptr, given, sums, rows, channels, slope, eps, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    mean, rstd, scale, bias = _of_channels(given, group, c, channels, eps, ACC)
    mean_dz = tl.load(sums[0] + group * channels + c, c < channels, other=0.0) / rows
    mean_dz_xhat = tl.load(sums[1] + group * channels + c, c < channels, other=0.0) / rows
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    at = (group.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    centred = tl.load(x_ptr + at, mask, other=0.0).to(ACC) - mean
    dy = tl.load(dy_ptr + at, mask, other=0.0).to(ACC)
    dz = tl.where(centred * scale + bias > 0, dy, dy * slope)
    dx = scale * (dz - mean_dz[None, :] - centred * rstd * mean_dz_xhat[None, :])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)


def _tiles(x: Tensor, groups: int) -> tuple[int, int, int, dict[str, Any]]:
    """R, C, the rows of a slice, and the block of a kernel that walks x."""
    channels, rows = x.shape[1], x.numel() // (x.shape[1] * groups)
    block_c = min(64, power_of_two(channels))  # 64 channels of bf16 are a cache line
    block_r = min(_TILE // block_c, power_of_two(rows))
    wanted = max(1, SM_PROGRAMS // (cdiv(channels, block_c) * groups))
    slice_rows = cdiv(cdiv(rows, block_r), wanted) * block_r
    acc = TRITON_DTYPES[wide_dtype(x)]
    return rows, channels, slice_rows, {"ACC": acc, "BLOCK_R": block_r, "BLOCK_C": block_c, **FOUR_WARPS}


def _merge_block(slices: int, channels: int) -> dict[str, Any]:
    return {"BLOCK_S": min(64, power_of_two(slices)), "BLOCK_C": min(16, power_of_two(channels)), **FOUR_WARPS}


def _pair(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(shape, dtype=wide_dtype(x), device=x.device) for _ in range(2))  # type: ignore[return-value]


def _rows_of(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _statistics_triton(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    num_groups: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    x = _rows_of(x)
    rows, channels, slice_rows, block = _tiles(x, num_groups)
    slices = cdiv(rows, slice_rows)
    parts = _pair(x, num_groups, slices, channels)
    moments = _pair(x, num_groups, channels)
    grid = (slices, cdiv(channels, block["BLOCK_C"]), num_groups)
    _slice_moments[grid](x, parts, rows, channels, slice_rows, **block)
    merge = _merge_block(slices, channels)
    running = (running_mean, running_var, num_batches_tracked)
    sizes = (rows, channels, slices, slice_rows, num_groups)
    grid_merge = (cdiv(channels, merge["BLOCK_C"]),)
    _merge_moments[grid_merge](parts, moments, running, *sizes, momentum, ACC=block["ACC"], **merge)
    return moments


def _forward_triton(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float
) -> Tensor:
    x, groups = _rows_of(x), len(mean)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    rows, channels, _, block = _tiles(x, groups)
    grid = (cdiv(rows, block["BLOCK_R"]), cdiv(channels, block["BLOCK_C"]), groups)
    _forward[grid](x, y, (weight, bias, mean, var), rows, channels, slope, eps, **block)
    return y


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, groups = _rows_of(dy), _rows_of(x), len(mean)
    rows, channels, slice_rows, block = _tiles(x, groups)
    slices = cdiv(rows, slice_rows)
    parts, sums = _pair(x, groups, slices, channels), _pair(x, groups, channels)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dbias, dweight = torch.empty_like(bias), torch.empty_like(weight)
    given = (weight, bias, mean, var)
    channel_blocks = cdiv(channels, block["BLOCK_C"])
    grid = (slices, channel_blocks, groups)
    _slice_sums[grid](dy, x, given, parts, rows, channels, slice_rows, slope, eps, **block)
    merge = _merge_block(slices, channels)
    grid_merge = (cdiv(channels, merge["BLOCK_C"]),)
    _merge_sums[grid_merge](parts, sums, (dbias, dweight), channels, slices, groups, ACC=block["ACC"], **merge)
    grid = (cdiv(rows, block["BLOCK_R"]), channel_blocks, groups)
    _backward[grid](dy, x, dx, given, sums, rows, channels, slope, eps, **block)
    return dx, dweight, dbias


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(G, R, C) in the type that sums are kept in."""
    return x.permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1]).to(wide_dtype(x))


def _as_images(rows: Tensor, x: Tensor) -> Tensor:
    """(G, R, C) back in the shape and type of x, channels-last."""
    n, channels, height, width = x.shape
    images = rows.view(n, height, width, channels).permute(0, 3, 1, 2)
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(images)


@torch.library.custom_op(
    "dcgan::batchnorm_statistics",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
    device_types="cpu",
)
def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    num_groups: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    if INTERPRETED:
        return _statistics_triton(x, running_mean, running_var, num_batches_tracked, num_groups, momentum)
    rows = _by_group(x, num_groups)
    var, mean = torch.var_mean(rows, 1, correction=0)
    count = rows.shape[1]
    for group_mean, group_var in zip(mean, var * (count / (count - 1)), strict=True):
        running_mean.mul_(1 - momentum).add_(group_mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(group_var, alpha=momentum)
    num_batches_tracked.add_(num_groups)
    return mean, var


_statistics.register_kernel("cuda")(_statistics_triton)


@_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    num_groups: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    shape = num_groups, x.shape[1]
    return x.new_empty(shape, dtype=wide_dtype(x)), x.new_empty(shape, dtype=wide_dtype(x))


@torch.library.custom_op("dcgan::batchnorm_act", mutates_args=(), device_types="cpu")
def _batchnorm_act(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float
) -> Tensor:
    if INTERPRETED:
        return _forward_triton(x, weight, bias, mean, var, slope, eps)
    scale = weight * torch.rsqrt(var + eps)
    z = (_by_group(x, len(mean)) - mean[:, None]) * scale[:, None] + bias
    return _as_images(torch.where(z > 0, z, z * slope), x)


_batchnorm_act.register_kernel("cuda")(_forward_triton)


@_batchnorm_act.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("dcgan::batchnorm_act_backward", mutates_args=(), device_types="cpu")
def _batchnorm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if INTERPRETED:
        return _backward_triton(dy, x, weight, bias, mean, var, slope, eps)
    rstd = torch.rsqrt(var + eps)[:, None]
    xhat = (_by_group(x, len(mean)) - mean[:, None]) * rstd
    dy = _by_group(dy, len(mean))
    dz = torch.where(xhat * weight + bias > 0, dy, dy * slope)
    sums = dz.sum(1), (dz * xhat).sum(1)
    mean_dz, mean_dz_xhat = (each[:, None] / xhat.shape[1] for each in sums)
    dx = weight * rstd * (dz - mean_dz - xhat * mean_dz_xhat)
    return _as_images(dx, x), sums[1].sum(0).to(weight.dtype), sums[0].sum(0).to(bias.dtype)


_batchnorm_act_backward.register_kernel("cuda")(_backward_triton)


@_batchnorm_act_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.slope, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # The statistics are functions of x, which dx takes into account: of their own they have no gradient.
    dx, dweight, dbias = _batchnorm_act_backward(dy, *ctx.saved_tensors, ctx.slope, ctx.eps)
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, None, None, None, None


_batchnorm_act.register_autograd(_gradient, setup_context=_keep)


def batchnorm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    slope: float,
    num_groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm in training, then ReLU (slope 0) or LeakyReLU; once differentiable in x, weight and bias.

    Args:
        x: (N, C, H, W), any float dtype; copied where its memory is not channels-last.
        weight, bias: (C,), of any float dtype.
        running_mean, running_var: (C,), moved by each group in order as torch.nn.BatchNorm2d does.
        num_batches_tracked: () int64, grows by num_groups.
        num_groups: equal consecutive parts of the batch, each with statistics of its own.  Divides N, and leaves each
            part more than one value a channel.

    Returns:
        (N, C, H, W) channels-last, of x's dtype.
    """
    assert x.dim() == 4, x.shape
    assert len(x) % num_groups == 0, (len(x), num_groups)
    assert x.numel() > x.shape[1] * num_groups, "a variance needs more than one value a channel"
    running = running_mean, running_var, num_batches_tracked
    mean, var = _statistics(x.detach(), *running, num_groups, momentum)
    return _batchnorm_act(x, weight, bias, mean, var, slope, eps)
