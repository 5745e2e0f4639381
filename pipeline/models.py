"""Generator and discriminator of DCGAN (Radford, Metz, Chintala 2016), for any image size.

At 64 x 64 they are the networks of the PyTorch DCGAN tutorial: 3,576,704 and 2,765,568 parameters at ngf = ndf = 64.
Other sizes have n stride-2 layers, n the largest with min(H, W) / 2^n >= 4, and widths that double from ngf (ndf)
inward up to 8 times.  Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernels import pixel_major
from kernels.batchnorm_act import batchnorm_act
from kernels.image_ends import conv_leaky_relu, conv_transpose_tanh
from pipeline.config import num_halvings

LEAK = 0.2
"""Slope of D's activations below 0."""


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that can treat a batch as several, each normalised by its own statistics.

    Real and fake images may then share one pass through the discriminator and still be separate batches to
    BatchNorm, as the algorithm has them: outputs, gradients and running statistics equal those of one call a group,
    in order.
    """

    num_groups: int = 1
    """Equal consecutive parts of the batch; set by the network for the length of a forward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.num_groups == 1 or not self.training:
            return super().forward(x)
        return torch.cat([super(GroupedBatchNorm2d, self).forward(part) for part in x.chunk(self.num_groups)])


class SpectralNorm(nn.Module):
    """A weight divided by its largest singular value, which one power iteration a forward pass follows.

    Miyato et al. 2018, "Spectral normalization for generative adversarial networks", equation 8 and algorithm 1.  The
    weight counts as a matrix (out, in * height * width); the singular vectors are constants to the gradient.  Not
    torch.nn.utils.parametrizations.spectral_norm, whose result it shares, because that starts from torch's global
    random state, which differs from rank to rank, and takes the products in autocast's low precision.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", matrix.new_zeros(matrix.shape[0]))
        self.register_buffer("v", matrix.new_zeros(matrix.shape[1]))
        self.settle(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor, iterations: int = 15) -> None:
        """Find the singular vectors of this weight anew; the same ones for the same weight."""
        fixed = torch.Generator().manual_seed(0)
        self.v.copy_(torch.randn(self.v.shape, generator=fixed, device="cpu"))
        for _ in range(iterations):
            self._iterate(weight.flatten(1))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with _full_precision(weight.device.type):
            matrix = weight.flatten(1)
            if self.training:
                self._iterate(matrix)
            # Copies, since D's next forward moves both before this one's backward.
            return weight / torch.dot(self.u.clone(), matrix @ self.v.clone())


def _full_precision(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Autocast switched off, where the device has such a thing."""
    if device_type == "meta":  # on which sizes are worked out; torch.compile of 2.11 cannot see whom it could ask
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


Kernels = Literal["torch", "triton"]
"""Who computes a layer together with what stands beside it: torch, one after the other, or kernels/, as one."""


def through(layers: Iterable[nn.Module], x: Tensor, batchnorm_act_by: Kernels, num_groups: int = 1) -> Tensor:
    """x through all layers; BatchNorm in training and the activation behind it as one where kernels/ shall.

    Hooks on layers that were taken as one are not called.
    """
    waiting = iter(layers)
    for layer in waiting:
        if isinstance(layer, GroupedBatchNorm2d):
            layer.num_groups = num_groups
        if batchnorm_act_by == "triton" and isinstance(layer, nn.BatchNorm2d) and _can_be_fused(layer):
            activation: Any = next(waiting)
            slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
            running: Any = layer.running_mean, layer.running_var, layer.num_batches_tracked
            momentum: Any = layer.momentum
            settings = {"slope": slope, "num_groups": num_groups, "momentum": momentum, "eps": layer.eps}
            x = batchnorm_act(x, layer.weight, layer.bias, *running, **settings)
        else:
            x = layer(x)
    return x


def _can_be_fused(layer: nn.BatchNorm2d) -> bool:
    """In training as usual: the batch's statistics, and running ones that follow by a fixed share."""
    return layer.training and layer.track_running_stats and layer.momentum is not None


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """The paper's initial weights (section 3): convolutions N(0, 0.02), BatchNorm scales N(1, 0.02), shifts 0.

    Spectral norm takes nothing from the generator: with it and without it the weights before division are the same.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            normed: Any = module.parametrizations["weight"] if parametrize.is_parametrized(module) else None  # type: ignore[index]
            weight = normed.original if normed is not None else module.weight
            nn.init.normal_(weight, 0.0, 0.02, generator=generator)
            if normed is not None:
                normed[0].settle(weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Draws images from latent vectors: (N, nz) -> (N, nc, height, width) in [-1, 1]."""

    batchnorm_act: Kernels = "torch"
    image_ends: Kernels = "torch"
    native: torch.dtype | None = None
    """Train through the C kernels where the step computes in this dtype: see `native_problem`."""

    def __init__(self, nz: int, ngf: int, nc: int, height: int, width: int) -> None:
        super().__init__()
        n = num_halvings(height, width)
        widths = [ngf * min(8, 1 << (n - 1 - i)) for i in range(n)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], (height >> n, width >> n), bias=False)]
        for inner, outer in zip(widths, [*widths[1:], nc], strict=True):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        if _trains_natively(self):
            return torch.tanh(self._pixel_major(latents))
        inner: list[nn.Module]
        last: Any
        *inner, last = self.layers
        x = through(inner, latents[:, :, None, None], self.batchnorm_act)
        return conv_transpose_tanh(x, last.weight) if self.image_ends == "triton" else torch.tanh(last(x))

    def _pixel_major(self, latents: Tensor) -> Tensor:
        first, *hidden, last = (m for m in self.layers if isinstance(m, nn.ConvTranspose2d))
        norms = [m for m in self.layers if isinstance(m, nn.BatchNorm2d)]
        nz, channels, height, width = first.weight.shape
        # Each pixel of the first layer is a product of its own: (N, nz) by (nz, C).
        x = torch.matmul(latents, first.weight.permute(2, 3, 0, 1).reshape(height * width, nz, channels))
        x = x.view(height, width, len(latents), channels)
        for norm, conv in zip(norms, hidden, strict=False):
            x = pixel_major.conv_transpose(_normalised(norm, x, 0.0), conv.weight)
        return pixel_major.image_conv_transpose(_normalised(norms[-1], x, 0.0), last.weight)


class Discriminator(nn.Module):
    """Judges images: (N, nc, height, width) -> (N,) logits, above 0 for what it takes for a photograph.

    With spectral_norm every convolution's weight is divided by its largest singular value.  The state then has
    layers.I.parametrizations.weight.original in place of layers.I.weight, and the singular vectors as buffers, so that
    one kind's state does not load into the other.
    """

    batchnorm_act: Kernels = "torch"
    image_ends: Kernels = "torch"
    native: torch.dtype | None = None
    """Train through the C kernels where the step computes in this dtype: see `native_problem`."""

    def __init__(self, ndf: int, nc: int, height: int, width: int, *, spectral_norm: bool = False) -> None:
        super().__init__()
        n = num_halvings(height, width)
        widths = [ndf * min(8, 1 << i) for i in range(n)]
        layers: list[nn.Module] = [nn.Conv2d(nc, widths[0], 4, stride=2, padding=1, bias=False)]
        layers += [nn.LeakyReLU(LEAK, inplace=True)]
        for outer, inner in itertools.pairwise(widths):
            layers += [nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=False)]
            layers += [GroupedBatchNorm2d(inner), nn.LeakyReLU(LEAK, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 1, (height >> n, width >> n), bias=False)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if spectral_norm and isinstance(layer, nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def forward(self, images: Tensor, num_groups: int = 1) -> Tensor:
        if _trains_natively(self):
            return self._pixel_major(images, num_groups)
        inner: list[nn.Module]
        first: Any
        activation: Any
        first, activation, *inner = self.layers
        if self.image_ends == "triton":
            x = conv_leaky_relu(images, first.weight, activation.negative_slope)
        else:
            x = activation(first(images))
        return through(inner, x, self.batchnorm_act, num_groups).flatten()

    def _pixel_major(self, images: Tensor, num_groups: int) -> Tensor:
        first, *hidden, last = (m for m in self.layers if isinstance(m, nn.Conv2d))
        norms = [m for m in self.layers if isinstance(m, nn.BatchNorm2d)]
        x = pixel_major.image_conv(images.to(self.native), first.weight, LEAK)
        for conv, norm in zip(hidden, norms, strict=True):
            x = _normalised(norm, pixel_major.conv(x, conv.weight), LEAK, num_groups)
        # The whole picture under one weight; products and sum in float32.
        return (x.float() * last.weight.permute(0, 2, 3, 1)[0, :, :, None]).sum((0, 1, 3))


def _trains_natively(network: Generator | Discriminator) -> bool:
    """The kernels are for training steps, in the dtype of the step; pictures and checks go the plain way."""
    if network.native is None or not network.training:
        return False
    computes_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return network.native == computes_in


def _normalised(norm: nn.BatchNorm2d, x: Tensor, slope: float, num_groups: int = 1) -> Tensor:
    """A BatchNorm layer in training, then a leaky ReLU, over (H, W, N, C)."""
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked += num_groups
    return pixel_major.batchnorm_act(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps, slope, num_groups
    )


def native_problem(generator: Generator, discriminator: Discriminator, images: int, dtype: torch.dtype) -> str:
    """Why these networks cannot train through kernels/pixel_major.py, in a few words; empty: they can.

    Args:
        images: of a step on each rank.
        dtype: that the step computes in, bfloat16 or float32.
    """
    norms = [m for network in (generator, discriminator) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    first: Any = discriminator.layers[0]
    channels = [norm.num_features for norm in norms] + [first.out_channels]
    if any(parametrize.is_parametrized(m) for m in discriminator.modules()):
        return "they know no spectral norm"
    if any(c % pixel_major.CHANNELS for c in channels):
        return f"they take channels by {pixel_major.CHANNELS}"
    if images % pixel_major.IMAGES[dtype]:
        return f"they take images by {pixel_major.IMAGES[dtype]}, and a rank's part of the batch is {images}"
    return ""


def forward_flops(network: Generator | Discriminator, height: int, width: int) -> list[int]:
    """Floating-point operations of each convolution for one image, two a multiply-add, from the input on.

    Args:
        height, width: of the image that the network draws or judges, in pixels.
    """
    convs = [m for m in network.layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    flops = []
    for i, conv in enumerate(convs):
        # The grid on which each weight is used once: a convolution's outputs, a transposed one's inputs.
        steps = i - 1 if isinstance(network, Generator) else i + 1
        if isinstance(network, Generator):
            grid = (1, 1) if i == 0 else (height >> (len(convs) - 1 - steps), width >> (len(convs) - 1 - steps))
        else:
            grid = (1, 1) if i == len(convs) - 1 else (height >> steps, width >> steps)
        weights = conv.in_channels * conv.out_channels * math.prod(conv.kernel_size)
        flops.append(2 * weights * grid[0] * grid[1])
    return flops


def step_flops(generator: Generator, discriminator: Discriminator, height: int, width: int) -> int:
    """Floating-point operations of one training step for one image: convolutions only, no wasted gradients.

    G forward once and backward without its input's gradient; D forward three times, its weight gradients for two
    passes (no gradient to the first layer's input), its input gradients for the third.
    """
    g, d = forward_flops(generator, height, width), forward_flops(discriminator, height, width)
    generator_pass = sum(g) + 2 * sum(g) - g[0]
    discriminator_pass = 2 * (3 * sum(d) - d[0])
    return generator_pass + discriminator_pass + 2 * sum(d)
