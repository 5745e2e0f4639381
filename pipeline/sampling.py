"""Pictures out of a generator, the same ones for the same seed.

During training a generator's BatchNorm layers normalise by the batch at hand, and their running statistics trail behind
weights that keep moving.  A sample made with either depends on its neighbours or shows noise.  So a sample is always
drawn from a copy whose statistics are measured anew for the weights as they are (Wu and Johnson 2021, "Rethinking
'Batch' in BatchNorm", section 3: precise BatchNorm).

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import philox
from pipeline.philox import Stream
from pipeline.pictures import to_uint8

RECALIBRATION_SEED = 0
"""The same latents measure the statistics in every run, so that equal weights give equal pictures."""


def latents(seed: int, stream: Stream, start: int, count: int, nz: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal latents of the image numbers start .. start + count - 1: (count, nz) float32 on the device."""
    return philox.normal(seed, stream, torch.arange(start, start + count, device=device), nz)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """The way from a to b along the arc between them, where Gaussian latents live, not through the thin middle.

    Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; the lengths of a and b need not be 1.

    Args:
        a, b: (..., nz) float.
        t: 0 gives a, 1 gives b; a number, or a tensor that broadcasts against (..., 1).

    Returns:
        (..., nz).  Where a and b point the same way, or opposite ways (no arc is shorter than another), or one is
        zero, the straight line.
    """
    lengths = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    cosine = ((a * b).sum(dim=-1, keepdim=True) / lengths.clamp_min(torch.finfo(a.dtype).tiny)).clamp(-1, 1)
    angle, sine = torch.acos(cosine), torch.sqrt(1 - cosine * cosine)
    straight = (sine < 1e-3) | (lengths == 0)  # float32 leaves a sine below this only three good digits
    divisor = torch.where(straight, 1.0, sine)
    from_a = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / divisor)
    from_b = torch.where(straight, t, torch.sin(t * angle) / divisor)
    return from_a * a + from_b * b


@torch.no_grad()
def recalibrated(
    generator: nn.Module, nz: int, *, images: int = 2048, batch: int = 128, seed: int = RECALIBRATION_SEED
) -> nn.Module:
    """A copy for sampling, in eval mode and float32, whose BatchNorm statistics belong to its weights.

    Each running mean and variance is the mean of that statistic over whole batches of fixed latents; the generator
    itself and torch's random state stay as they are.

    Args:
        generator: maps (N, nz) latents to (N, C, H, W) images.
        nz: length of a latent.
        images: latents to measure with, rounded up to whole batches.  At least 2.
        batch: latents at a time.
        seed: of the latents.

    Returns:
        The copy, on the generator's device.
    """
    twin = _without_collectives(copy.deepcopy(generator)).float().eval()
    layers = [m for m in twin.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return twin
    device = next(itertools.chain(twin.parameters(), twin.buffers())).device
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch then keeps the plain mean over the batches
        layer.train()
    batch = min(batch, images)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, images, batch):
            twin(latents(seed, Stream.RECALIBRATE_LATENT, start, batch, nz, device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return twin.eval()


def _without_collectives(module: nn.Module) -> nn.Module:
    """SyncBatchNorm becomes BatchNorm2d, in place: rank 0 samples alone, and would wait for the others for ever."""
    if isinstance(module, nn.SyncBatchNorm):
        plain = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
        plain.load_state_dict(module.state_dict())
        return plain.to(module.running_mean.device if module.running_mean is not None else None)
    for name, child in module.named_children():
        setattr(module, name, _without_collectives(child))
    return module


@torch.inference_mode()
def generate(generator: nn.Module, latents: Tensor, batch: int = 64) -> Tensor:
    """The pictures of these latents.

    Args:
        generator: in eval mode, so that a picture depends on nothing but its latent (see `recalibrated`).
        latents: (N, nz) float, N at least 1, on the generator's device.
        batch: pictures at a time.

    Returns:
        (N, H, W, C) uint8 on the CPU.
    """
    assert not generator.training, "generate() wants a generator in eval mode"
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([to_uint8(generator(part)).cpu() for part in latents.split(batch)])
