"""The latent whose picture comes nearest to a photograph, found by optimisation.

Bojanowski et al. 2018, "Optimizing the latent space of generative networks", section 3: pixels and the bands of a
Laplacian pyramid; Bora et al. 2017, "Compressed sensing using generative models", section 6: gradient descent on z from
several starts, and a penalty that keeps z where G has been trained.

Legend: N photographs, K starts of each, C channels, H x W pixels, nz the latent's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.normalize import normalize
from pipeline.config import DataConfig
from pipeline.decode import Pixels, middle, window_shape
from pipeline.decode.pillow import decode
from pipeline.errors import DataError
from pipeline.files import written_aside
from pipeline.headers import BadImage, read_size
from pipeline.sampling import generate

CANDIDATES = 512
"""Samples, the nearest of which a photograph's optimisation starts from."""
STARTS = 4
STEPS = 200
LR = 0.1
"""Adam's, at the first step; it falls to 0 in a straight line."""
PRIOR = 0.1
"""Weight of the penalty (|z|^2 / nz - 1)^2."""


@dataclass(frozen=True)
class Projection:
    """What was found for N photographs."""

    latents: Tensor
    """(N, nz) float32, on the CPU."""
    pictures: Tensor
    """(N, H, W, C) uint8, on the CPU."""
    errors: Tensor
    """(N,) float64: mean distance of a picture's values from the photograph's, of 255."""


def read_photograph(path: Path, cfg: DataConfig) -> Pixels:
    """A photograph as training sees it without augmentation: resized, cut from the middle.  (H, W, C) uint8.

    Raises:
        DataError: no JPEG or PNG that can be read, or of too many pixels.
    """
    height, width, channels = window_shape(cfg)
    try:
        content = path.read_bytes()
        size = read_size(content, cfg.max_pixels)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except BadImage as error:
        raise DataError(f"{path} {error}") from error
    window = decode(np.frombuffer(content, np.uint8), size, (height, width), channels, str(path))
    return middle(window[None], cfg)[0].copy()


def bands(images: Tensor) -> Iterator[Tensor]:
    """The Laplacian pyramid of (N, C, H, W), finest first: what each halving loses, then what is left.

    Halved by means of 2 x 2 pixels and doubled by repetition, while both sides are even and halve to 4 or more.
    """
    while min(images.shape[2:]) >= 8 and images.shape[2] % 2 == images.shape[3] % 2 == 0:
        half = F.avg_pool2d(images, 2)
        yield images - F.interpolate(half, scale_factor=2.0)
        images = half
    yield images


def distance(images: Tensor, targets: Tensor) -> Tensor:
    """(N,) mean square of the pixels' differences, and the mean size of each band's.

    A mean weighs a band 4 times as much as a sum for each halving, as the paper does.  Both sides in [-1, 1].
    """
    difference = images - targets  # the pyramid is linear: that of the difference is the difference of the two
    return difference.square().mean((1, 2, 3)) + sum(band.abs().mean((1, 2, 3)) for band in bands(difference))


def project(
    generator: nn.Module,
    photographs: Tensor,
    candidates: Tensor,
    *,
    steps: int = STEPS,
    starts: int = STARTS,
    batch: int = 64,
    after: Callable[[int], None] = lambda _: None,
) -> Projection:
    """Adam on the latents, from each photograph's nearest candidates; the best result of each is kept.

    `steps` forward and backward passes of `starts` pictures a photograph: the time is the same for every photograph.

    Args:
        generator: in eval mode (see pipeline.sampling.recalibrated).
        photographs: (N, H, W, C) uint8 on the CPU.
        candidates: (M, nz) float32 latents on the generator's device, M at least `starts`.
        batch: pictures at a time.
        after: called with the number of photographs done.
    """
    assert not generator.training, "project() wants a generator in eval mode"
    drawn = generate(generator, candidates, batch)
    found, pictures = [], []
    for part in photographs.split(max(1, batch // starts)):
        targets = normalize(part.to(candidates.device), torch.float32)
        nearest = _nearest(drawn, targets.cpu(), starts, batch).to(candidates.device)
        latents, loss = _descend(generator, candidates[nearest].flatten(0, 1), targets, steps)
        best = loss.view(len(part), starts).argmin(1)
        found.append(latents.view(len(part), starts, -1)[torch.arange(len(part)), best])
        pictures.append(generate(generator, found[-1], batch))
        after(sum(map(len, found)))
    reached = torch.cat(pictures)
    errors = (reached.double() - photographs.double()).abs().mean((1, 2, 3))
    return Projection(torch.cat(found).cpu(), reached, errors)


@torch.no_grad()
def _nearest(drawn: Tensor, targets: Tensor, count: int, batch: int) -> Tensor:
    """(N, count) int64: which of the drawn pictures (M, H, W, C) uint8 lie nearest to each target, nearest first."""
    distances = []
    for part in drawn.split(batch):
        pictures = normalize(part, torch.float32)
        distances.append(torch.stack([distance(pictures, target[None]) for target in targets]))
    return torch.cat(distances, dim=1).topk(count, largest=False).indices


def _descend(generator: nn.Module, latents: Tensor, targets: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Latents (N K, nz) moved towards the targets (N, C, H, W); returns them with their losses (N K,)."""
    targets = targets.repeat_interleave(len(latents) // len(targets), 0)
    z = latents.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=LR)

    def losses() -> Tensor:
        outside = (z.square().mean(1) - 1).square()
        return distance(generator(z), targets) + PRIOR * outside

    with torch.autocast(z.device.type, enabled=False):
        for step in range(steps):
            adam.param_groups[0]["lr"] = LR * (1 - step / steps)
            (z.grad,) = torch.autograd.grad(losses().sum(), z)  # G's own weights get none
            adam.step()
        with torch.no_grad():
            return z.detach(), losses()


def save_latents(path: Path, projection: Projection, photographs: Sequence[Path]) -> None:
    """An .npz of `latents` (N, nz), `errors` (N,) and `photographs`, their names.

    Raises:
        StorageError: the disk refused.
    """
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(
            file,
            latents=projection.latents.numpy(),
            errors=projection.errors.numpy(),
            photographs=np.array([str(p) for p in photographs]),
        )
