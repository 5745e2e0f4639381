"""The peer: a DCGAN trained as a tutorial does it, in plain PyTorch.  It shares no code with the pipeline.

Float32, contiguous tensors, a Dataset of files read by Pillow, torchvision's transforms, a DataLoader with two
workers (more, or both networks compiled, where that is the question), BCELoss after a sigmoid, Adam as torch builds
it.  It is no straw man: it has all cores as threads, workers that never end and thus never start anew, no last batch
that is smaller, and cuDNN may choose its algorithms.  What the tutorial does each iteration it does as well: the losses
and D's mean judgements are read back as numbers.

Legend: N images, C = 3 channels, S x S pixels, nz the latent's length.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

NUM_WORKERS = 2
CHANNELS = 3


class Photographs(Dataset[tuple[Tensor, int]]):
    """Files as (C, S, S) float32 in [-1, 1], each with a class of 0 that nobody uses, as ImageFolder gives them."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = list(paths)
        self.transform = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * CHANNELS, (0.5,) * CHANNELS),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[item]) as image:
            return self.transform(image.convert("RGB")), 0


class EndlessShuffle(Sampler[int]):
    """One random permutation after another.  Between epochs the workers then neither stop nor wait."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def _widths(first: int, size: int) -> list[int]:
    """Channels between the stride-2 layers, from the image inward: they double up to 8 times; 64 -> 1, 2, 4, 8."""
    assert size >= 8, size
    assert size & (size - 1) == 0, size
    return [first * min(8, 1 << i) for i in range(size.bit_length() - 3)]


def make_generator(nz: int, ngf: int, size: int) -> nn.Sequential:
    """(N, nz, 1, 1) -> (N, C, S, S) in [-1, 1]."""
    widths = _widths(ngf, size)[::-1]
    layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], 4, 1, 0, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(ngf, CHANNELS, 4, 2, 1, bias=False), nn.Tanh())


def make_discriminator(ndf: int, size: int) -> nn.Sequential:
    """(N, C, S, S) -> (N, 1, 1, 1), the probability of a photograph."""
    widths = _widths(ndf, size)
    layers: list[nn.Module] = [nn.Conv2d(CHANNELS, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for outer, inner in itertools.pairwise(widths):
        layers += [nn.Conv2d(outer, inner, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(inner), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False), nn.Sigmoid())


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class PlainLoop:
    """The tutorial's training, to be run in blocks of steps.

    Args:
        paths: the photographs; every batch is full, whatever their number.  None: only step() may be called.
        size: S, a power of two from 8 on.
        workers: processes that read.
        compiled: both networks under torch.compile, as its documentation has it: a line each and nothing else.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int = 64,
        batch_size: int = 128,
        nz: int = 100,
        ngf: int = 64,
        ndf: int = 64,
        lr: float = 2e-4,
        beta1: float = 0.5,
        device: torch.device | str = "cpu",
        workers: int = NUM_WORKERS,
        compiled: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.nz = nz
        self._batches: Iterator[list[Tensor]] | None = None
        if paths:
            loader = DataLoader(
                Photographs(paths, size),
                batch_size=batch_size,
                sampler=EndlessShuffle(len(paths)),
                num_workers=workers,
                persistent_workers=True,
            )
            self._batches = iter(loader)  # starts the workers
        self.generator: nn.Module = make_generator(nz, ngf, size).apply(_draw_weights).to(self.device)
        self.discriminator: nn.Module = make_discriminator(ndf, size).apply(_draw_weights).to(self.device)
        if compiled:
            for network in (self.generator, self.discriminator):
                network.compile(dynamic=False)
        self.criterion = nn.BCELoss()
        self.adam_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=(beta1, 0.999))
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(beta1, 0.999))
        self.losses_d: list[float] = []
        self.losses_g: list[float] = []
        self.wait_s = 0.0
        """Seconds that the loop has waited for the DataLoader so far."""

    def step(self, real: Tensor, noise: Tensor) -> tuple[float, float, float]:
        """One iteration: D on photographs, D on fakes, D's update, G's update; adds to the lists of losses.

        Args:
            real: (N, C, S, S) float32 in [-1, 1], on the device.
            noise: (N, nz, 1, 1).

        Returns:
            D(x), and D(G(z)) before and after D's update.
        """
        self.discriminator.zero_grad()
        label = torch.full((len(real),), 1.0, device=self.device)
        judged = self.discriminator(real).view(-1)
        loss_real = self.criterion(judged, label)
        loss_real.backward()
        d_real = judged.mean().item()

        fake = self.generator(noise)
        label.fill_(0.0)
        judged = self.discriminator(fake.detach()).view(-1)
        loss_fake = self.criterion(judged, label)
        loss_fake.backward()
        before = judged.mean().item()
        loss_d = loss_real + loss_fake
        self.adam_d.step()

        self.generator.zero_grad()
        label.fill_(1.0)
        judged = self.discriminator(fake).view(-1)
        loss_g = self.criterion(judged, label)
        loss_g.backward()
        after = judged.mean().item()
        self.adam_g.step()

        self.losses_g.append(loss_g.item())
        self.losses_d.append(loss_d.item())
        return d_real, before, after

    def prepare(self) -> None:
        """Set the process-wide switches as PyTorch has them by default; cuDNN may choose its algorithms."""
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False

    def run(self, steps: int) -> float:
        """Train for so many iterations on the next photographs; returns the seconds taken."""
        assert self._batches is not None, "closed, or without photographs"
        self.prepare()
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            real = next(self._batches)[0]
            self.wait_s += time.perf_counter() - asked
            real = real.to(self.device)
            self.step(real, torch.randn(len(real), self.nz, 1, 1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def close(self) -> None:
        """End the worker processes.  May be called twice."""
        self._batches = None  # the iterator ends and joins them as it goes
