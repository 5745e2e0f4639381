"""The operations that benchmarks.kernels measures, one function each: what they are, what they take, what they cost.

To add one: a function that takes a Setting and yields Cases, and its name in ALL.  Tensors live while their case is
measured, so a function makes them right before its `yield`.

Bytes are those that cannot be avoided: each tensor that is read or written counts once for each time it must pass
through memory, as the comment beside a formula says.  FLOPs of convolutions are counted by torch; those of other
operations are given here.

Legend: N images, C channels, H x W pixels; x input, y output, w weight, dy, dx, dw gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import say
from kernels import native, pixel_major
from kernels.adam_ema import FusedAdamEma
from kernels.batchnorm_act import batchnorm_act
from kernels.gather import gather, gather_reference
from kernels.image_ends import conv_leaky_relu, conv_transpose_tanh
from kernels.normalize import normalize, normalize_reference
from pipeline.config import DataConfig, num_halvings
from pipeline.index import cache_folder
from pipeline.models import LEAK, Generator
from pipeline.precision import Precision, dtype_of

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """The shapes and the arithmetic: by default those of the 64 x 64 networks."""

    batch: int
    device: torch.device
    precision: Precision
    size: int = 64
    """Pixels of an image's side."""
    width: int = 64
    """ngf and ndf."""
    nz: int = 100

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.precision)

    @property
    def widths(self) -> list[int]:
        """Channels between the stride-2 layers, from the image inward."""
        return [self.width * min(8, 1 << i) for i in range(num_halvings(self.size, self.size))]

    def activations(self, channels: int, side: int) -> Tensor:
        """(N, C, side, side) normal numbers in channels-last."""
        x = torch.randn(self.batch, channels, side, side, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weight(self, *shape: int) -> Tensor:
        """Normal numbers with the networks' initial spread, in channels-last."""
        w = (0.02 * torch.randn(*shape, device=self.device)).to(self.dtype)
        return w.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: int | None
    """None: as torch counts them on the reference."""
    num_bytes: int


@dataclass(frozen=True)
class Way:
    """An implementation of ours."""

    function: Function
    inputs: tuple[Tensor, ...] | None = None
    """What it is called with, where it wants another layout or type; None: what the reference is called with."""
    as_reference: Callable[[Tensor], Tensor] = lambda found: found
    """Brings a result or a gradient of another layout into the reference's; a view."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    name: str
    """Of the operation, then its place: `conv-3-64`."""
    shape: str
    reference: Function
    """The definition, which is also what torch.compile gets."""
    inputs: tuple[Tensor, ...]
    """What the reference is called with; gradients are taken for those that require one."""
    forward: Cost
    both: Cost | None = None
    """Of forward and backward together; None: has no gradient."""
    to_compile: Function | None = None
    """What torch.compile gets, where the reference is itself a fused call; None: the reference."""
    ours: Mapping[str, Way] = field(default_factory=dict)
    """Our implementations by name."""
    same: bool = True
    """Whether all give the same result for the same inputs, which does not hold where inputs change in place."""


def size_of(*tensors: Tensor) -> int:
    """Their bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def normalize_cases(setting: Setting) -> Iterator[Case]:
    """uint8 to [-1, 1] in channels-last."""
    side = setting.size
    images = torch.randint(0, 256, (setting.batch, side, side, 3), dtype=torch.uint8, device=setting.device)
    yield Case(
        "normalize",
        f"{side}x{side}x3",
        lambda x: normalize_reference(x, setting.dtype),
        (images,),
        Cost(2 * images.numel(), images.numel() * (1 + setting.dtype.itemsize)),  # read once, written once
        ours={"custom": Way(lambda x: normalize(x, setting.dtype))},
    )


@functools.cache
def _native(dtype: torch.dtype) -> bool:
    """Whether the C kernels for this type are to be had here; why not is said once."""
    try:
        native.load(cache_folder(DataConfig()), dtype)
    except native.NativeError as error:
        say(f"native is left out: {error}")
        return False
    return True


def _pixel_major(setting: Setting, function: Function, x: Tensor, *others: Tensor) -> dict[str, Way]:
    """A C kernel over activations (H, W, N, C) with float32 weights, where it can work at this shape."""
    channels = [side for t in (x, *others) for side in t.shape[:2] if t.dim() == 4 and side > 4]
    if x.device.type != "cpu" or x.dtype not in pixel_major.IMAGES or setting.batch % pixel_major.IMAGES[x.dtype]:
        return {}
    if any(c % pixel_major.CHANNELS for c in channels if c != setting.batch) or not _native(x.dtype):
        return {}
    moved = x.detach() if x.shape[1] <= 4 else pixel_major.from_images(x.detach())

    def as_reference(found: Tensor) -> Tensor:
        is_weight_or_images = found.dim() != 4 or found.shape[2:] == (4, 4) or found.shape[1] == 3
        return found if is_weight_or_images else pixel_major.to_images(found)

    own = (moved.requires_grad_(x.requires_grad), *(t.detach().float().requires_grad_() for t in others))
    return {"native": Way(function, own, as_reference)}


def _convolution(name: str, shape: str, function: Function, x: Tensor, w: Tensor, ours: Mapping[str, Way]) -> Case:
    y = function(x.detach(), w.detach())
    forward = size_of(x, w, y)  # x and w read, y written
    # dy and x read for dw, dy and w for dx, dw and dx written; dy comes once more, since each product reads it.
    backward = size_of(y, x, w) + size_of(y, w, x) if x.requires_grad else size_of(y, x, w)
    return Case(name, shape, function, (x, w), Cost(None, forward), Cost(None, forward + backward), ours=ours)


def conv_cases(setting: Setting) -> Iterator[Case]:
    """D's convolutions: 4 x 4 with stride 2, the first with its activation, then the head."""
    channels, side = [3, *setting.widths], setting.size
    for outer, inner in itertools.pairwise(channels):
        x = setting.activations(outer, side).requires_grad_(outer != 3)  # nobody wants D's gradient in photographs
        w = setting.weight(inner, outer, 4, 4).requires_grad_()
        shape, name = f"{side}x{side}x{outer}", f"{outer}-{inner}"
        if outer == 3:
            ours = _pixel_major(setting, lambda x, w: pixel_major.image_conv(x, w, LEAK), x, w)
            if setting.device.type == "cuda":
                ours["triton"] = Way(lambda x, w: conv_leaky_relu(x, w, LEAK))
            yield _convolution(f"conv-leaky-{name}", shape, lambda x, w: F.leaky_relu(_conv(x, w), LEAK), x, w, ours)
        else:
            yield _convolution(f"conv-{name}", shape, _conv, x, w, _pixel_major(setting, pixel_major.conv, x, w))
        side //= 2
    x = setting.activations(channels[-1], side).requires_grad_()
    w = setting.weight(1, channels[-1], side, side).requires_grad_()
    yield _convolution(f"conv-{channels[-1]}-1", f"{side}x{side}x{channels[-1]}", F.conv2d, x, w, {})


def _conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, stride=2, padding=1)


def conv_transpose_cases(setting: Setting) -> Iterator[Case]:
    """G's transposed convolutions: the first from 1 x 1, then 4 x 4 with stride 2, the last with its tanh."""
    widths, side = setting.widths[::-1], setting.size >> len(setting.widths)
    x = setting.activations(setting.nz, 1)  # latents have no gradient
    w = setting.weight(setting.nz, widths[0], side, side).requires_grad_()
    yield _convolution(f"conv-transpose-{setting.nz}-{widths[0]}", f"1x1x{setting.nz}", F.conv_transpose2d, x, w, {})
    for inner, outer in itertools.pairwise([*widths, 3]):
        x = setting.activations(inner, side).requires_grad_()
        w = setting.weight(inner, outer, 4, 4).requires_grad_()
        shape, name = f"{side}x{side}x{inner}", f"{inner}-{outer}"
        if outer == 3:
            ours = _pixel_major(setting, lambda x, w: torch.tanh(pixel_major.image_conv_transpose(x, w)), x, w)
            if setting.device.type == "cuda":
                ours["triton"] = Way(conv_transpose_tanh)
            drawn = lambda x, w: torch.tanh(_conv_transpose(x, w))  # noqa: E731
            yield _convolution(f"conv-transpose-tanh-{name}", shape, drawn, x, w, ours)
        else:
            ours = _pixel_major(setting, pixel_major.conv_transpose, x, w)
            yield _convolution(f"conv-transpose-{name}", shape, _conv_transpose, x, w, ours)
        side *= 2


def _conv_transpose(x: Tensor, w: Tensor) -> Tensor:
    return F.conv_transpose2d(x, w, stride=2, padding=1)


def batchnorm_cases(setting: Setting) -> Iterator[Case]:
    """BatchNorm with its activation: LeakyReLU behind D's layers but the first, ReLU behind all of G's but the last."""
    sides = [setting.size >> (i + 1) for i in range(len(setting.widths))]
    places = list(zip(setting.widths, sides, strict=True))
    layers = [("bn-leaky", LEAK, place) for place in places[1:]] + [("bn-relu", 0.0, place) for place in places]
    for name, slope, (channels, side) in layers:
        x = setting.activations(channels, side).requires_grad_()
        scale = torch.ones(channels, device=setting.device).requires_grad_()
        shift = torch.zeros(channels, device=setting.device).requires_grad_()

        def reference(x: Tensor, scale: Tensor, shift: Tensor, slope: float = slope) -> Tensor:
            return F.leaky_relu(F.batch_norm(x, None, None, scale, shift, training=True), slope)

        # Forward reads x for the statistics and again for y, which it writes; backward reads dy and x for two sums and
        # again for dx, which it writes.  About 10 operations a number forward and 15 backward, none of them a product.
        forward = Cost(10 * x.numel(), 3 * size_of(x))
        both = Cost(25 * x.numel(), 8 * size_of(x))
        shape = f"{side}x{side}x{channels}"

        def fused(x: Tensor, scale: Tensor, shift: Tensor, slope: float = slope) -> Tensor:
            return pixel_major.batchnorm_act(x, scale, shift, None, None, 0.1, 1e-5, slope)

        ours = _pixel_major(setting, fused, x, scale, shift)
        if setting.device.type == "cuda":
            ours["triton"] = Way(_triton_batchnorm(scale, slope))
        yield Case(f"{name}-{channels}", shape, reference, (x, scale, shift), forward, both, ours=ours)


def _triton_batchnorm(like: Tensor, slope: float) -> Function:
    mean, var = torch.zeros_like(like), torch.ones_like(like)
    count = torch.zeros((), dtype=torch.int64, device=like.device)
    return lambda x, scale, shift: batchnorm_act(x, scale, shift, mean, var, count, slope=slope)


def gather_cases(setting: Setting) -> Iterator[Case]:
    """Decoded images in memory to a batch: rows picked, mirrored, normalised."""
    side, many = setting.size, 8192 if setting.batch >= 128 else 16 * setting.batch
    images = torch.randint(0, 256, (many, side, side, 3), dtype=torch.uint8, device=setting.device)
    rows = torch.randint(many, (setting.batch,), device=setting.device)
    flip = torch.rand(setting.batch, device=setting.device) < 0.5
    numbers = setting.batch * side * side * 3
    yield Case(
        "gather",
        f"{side}x{side}x3",
        lambda images, rows, flip: gather_reference(images, rows, flip, None, None, side, side, setting.dtype),
        (images, rows, flip),
        Cost(2 * numbers, numbers * (1 + setting.dtype.itemsize)),  # a byte read, a value written
        # Which kernel the operator takes is its own business: C's on a CPU, where it is loaded.
        ours={
            "native" if setting.device.type == "cpu" and _native(torch.bfloat16) else "custom": Way(
                lambda images, rows, flip: gather(images, rows, setting.dtype, flip=flip)
            )
        },
    )


def adam_cases(setting: Setting) -> Iterator[Case]:
    """G's update and that of its average; eager is torch's fused Adam and a lerp, as a step without the kernel does."""
    network = Generator(setting.nz, setting.width, 3, setting.size, setting.size).to(setting.device)
    network.to(memory_format=torch.channels_last)
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-3)
    params = [p.detach() for p in network.parameters()]
    averages = [p.clone() for p in params]
    betas, lr, weight = (0.5, 0.999), 2e-4, 0.01
    plain = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)
    fused = FusedAdamEma(network.parameters(), lr=lr, betas=betas, averages=averages)
    fused.ema_weight = weight
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]

    def by_torch() -> Tensor:
        plain.step()
        torch._foreach_lerp_(averages, params, weight)
        return params[0]

    def by_definition() -> Tensor:  # at a fixed step: what changes from one to the next is two numbers
        for p, q, (m, v), average in zip(params, network.parameters(), moments, averages, strict=True):
            assert q.grad is not None
            m.lerp_(q.grad, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(q.grad, q.grad, value=1 - betas[1])
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-lr)
            average.lerp_(p, weight)
        return params[0]

    def by_kernel() -> Tensor:
        fused.step()
        return params[0]

    count = sum(p.numel() for p in params)
    yield Case(
        "adam-ema",
        f"{count:,}",
        by_torch,
        (),
        Cost(15 * count, 36 * count),  # p, g, m, v and the average read; p, m, v and the average written; float32
        to_compile=by_definition,
        ours={"custom": Way(by_kernel)} if setting.device.type == "cuda" else {},
        same=False,
    )


ALL: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "normalize": normalize_cases,
    "gather": gather_cases,
    "adam-ema": adam_cases,
    "batchnorm": batchnorm_cases,
    "conv": conv_cases,
    "conv-transpose": conv_transpose_cases,
}
"""By operation, as --only names them; where time is short the first come first."""
