"""Instance noise: normal, faded, and an image's own whatever batch, rank or memory format it comes in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.instance_noise import instance_noise, std_at

COUNT, SHAPE = 64, (3, 32, 32)


def noise_of(numbers: Tensor, seed: int = 1, part: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return instance_noise(torch.zeros(len(numbers), *shape), 1.0, seed, part, numbers)


def test_it_is_standard_normal_and_white() -> None:
    noise = noise_of(torch.arange(COUNT)).double()
    n = noise.numel()
    assert noise.mean().abs() < 5 / n**0.5
    assert (noise.var() - 1).abs() < 5 * (2 / n) ** 0.5
    kurtosis = (noise**4).mean() / noise.var() ** 2
    assert abs(kurtosis - 3) < 5 * (24 / n) ** 0.5
    sorted_, quantiles = noise.flatten().sort().values, (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (torch.special.ndtr(sorted_) - quantiles).abs().max() < 2 / n**0.5  # Kolmogorov and Smirnov
    neighbours = (
        noise[..., 1:] * noise[..., :-1],  # pixels side by side, one above the other
        noise[:, :, 1:] * noise[:, :, :-1],
        noise[:, 1:] * noise[:, :-1],  # channels of a pixel
        noise[1:] * noise[:-1],  # images
    )
    for products in neighbours:
        assert products.mean().abs() < 5 / products.numel() ** 0.5


def test_each_image_of_each_batch_has_its_own_and_it_is_found_again() -> None:
    numbers = torch.arange(7, 7 + COUNT)
    whole = noise_of(numbers)
    assert torch.equal(noise_of(numbers[20:30]), whole[20:30])  # another rank's part
    everything = torch.cat([whole, noise_of(numbers, part=1), noise_of(numbers, part=2), noise_of(numbers, seed=2)])
    first = everything.flatten(1)[:, :8]
    assert len(first.unique(dim=0)) == 4 * COUNT
    large = noise_of(torch.tensor([5, 5 + (1 << 32)]))
    assert not torch.equal(large[0], large[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_memory_format_are_kept_and_change_nothing_else(dtype: torch.dtype) -> None:
    numbers = torch.arange(8)
    images = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, *SHAPE)
    exact = images.to(dtype).double() + 0.25 * noise_of(numbers).double()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = images.to(dtype).contiguous(memory_format=memory_format)
        for std in (0.25, torch.tensor(0.25)):
            noisy = instance_noise(given, std, 1, 0, numbers)
            assert noisy.dtype == dtype
            assert noisy.stride() == given.stride()
            # Values stay below 4; the products and sums are float32's at best.
            rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            assert (noisy.double() - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize("shape", [(1, 16, 16), (4, 24, 16)])
def test_other_channels_and_sizes_have_noise_everywhere(shape: tuple[int, int, int]) -> None:
    noise = noise_of(torch.arange(200), shape=shape)
    assert noise.shape == (200, *shape)
    assert (noise.std(0) - 1).abs().max() < 0.35
    assert noise.ne(0).all()


def test_the_gradient_passes_through_unchanged() -> None:
    images = torch.zeros(4, *SHAPE, requires_grad=True)
    weights = torch.randn(4, *SHAPE)
    (instance_noise(images, 0.3, 1, 0, torch.arange(4)) * weights).sum().backward()
    assert torch.equal(images.grad, weights)


def test_it_fades_in_a_straight_line_and_stays_away() -> None:
    assert [std_at(0.2, 1000, seen) for seen in (0, 250, 500, 1000, 5000)] == [0.2, 0.15000000000000002, 0.1, 0.0, 0.0]
    images = torch.rand(4, *SHAPE)
    assert torch.equal(instance_noise(images, std_at(0.2, 1000, 1000), 1, 0, torch.arange(4)), images)
