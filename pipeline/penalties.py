"""Penalties on D's slope: how steeply its output changes with the pixels of an image.

D's output here is that of the D which plays: BatchNorm normalises by the batch at hand, so an image's slope holds what
it does to the outputs of its neighbours too, and a batch of images that are alike in all but one pays for that one.
Gulrajani et al. advise against BatchNorm in D for this reason (2017, section 4, "No critic batch normalization").  In
eval mode each image's slope would be its own, but of another function: weights that shrink would lessen the penalty,
and BatchNorm would undo that for the D which plays.  Running statistics neither enter nor learn from the penalty's
forward pass.

The slope is taken in the step's precision, but for fp16: there in float32, since no loss scale covers a gradient that
is taken before the loss is known.  In bf16 the gradient of either penalty differs from float32's by 0.8 to 1.5 % in
relative norm, that of the loss itself by 3 to 6 % (portraits, 64 x 64, ndf 32, N = 16 and 64, at the start and after 20
and 150 steps, CPU, 2026-11).

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import precision as precision_
from pipeline.precision import Precision


def gradient_penalty(
    discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, precision: Precision = "fp32"
) -> Tensor:
    """How far D's slope is from 1 between real and generated images: mean of (slope - 1)^2.

    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", equation 3, before its weight.

    Args:
        discriminator: in training mode; (N, C, H, W) -> (N,).
        real, fake: (N, C, H, W), any float dtype; no gradient reaches them.
        mix: (N,) in [0, 1]; the share of the real image in each place where the slope is taken.

    Returns:
        Scalar, float32, differentiable in D's parameters.
    """
    share = mix.view(-1, 1, 1, 1)
    between = share * _wide(real) + (1 - share) * _wide(fake)
    return (_slopes(discriminator, between, precision).norm(dim=1) - 1).square().mean()


def r1(discriminator: nn.Module, real: Tensor, precision: Precision = "fp32") -> Tensor:
    """D's slope on real images: half the mean of its square.

    Mescheder et al. 2018, "Which training methods for GANs do actually converge?", equation 9, before gamma.

    Args:
        discriminator: in training mode; (N, C, H, W) -> (N,).
        real: (N, C, H, W), any float dtype.

    Returns:
        Scalar, float32, differentiable in D's parameters.
    """
    return 0.5 * _slopes(discriminator, _wide(real), precision).square().sum(1).mean()


def _wide(images: Tensor) -> Tensor:
    """The images without their history, in float32 at least."""
    return images.detach().to(torch.promote_types(images.dtype, torch.float32))


def _slopes(discriminator: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """(N, C * H * W): the gradient of D's summed output in each image's pixels, itself differentiable."""
    arithmetic: Precision = "fp32" if precision == "fp16" else precision
    images = images.requires_grad_()
    with (
        precision_.autocast(arithmetic, images.device),
        _running_statistics_kept(discriminator),
        _torchs(discriminator),
    ):
        output = discriminator(images).sum()
        # In the images only: no parameter's gradient is touched, so DistributedDataParallel's hooks do not fire.
        (slopes,) = torch.autograd.grad(output, images, create_graph=True)
    return slopes.flatten(1)


@contextlib.contextmanager
def _running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm as in training, by the batch's own statistics, without moving the running ones."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    tracked = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, before in zip(layers, tracked, strict=True):
            layer.track_running_stats = before


@contextlib.contextmanager
def _torchs(network: nn.Module) -> Iterator[None]:
    """Layers computed by torch, since those of kernels/ have no second derivative."""
    switches = [name for name in ("batchnorm_act", "image_ends") if hasattr(network, name)]
    before = {name: getattr(network, name) for name in switches}
    for name in switches:
        setattr(network, name, "torch")
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)
