"""DiffAugment against the paper's steps written out pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffaugment import AUGMENTATIONS, NUM_DRAWS, diffaugment, draws

POLICY = ["color", "translation", "cutout"]
LAST = 1 - 2.0**-24
"""The largest draw."""


def drawn(count: int) -> Tensor:
    """Numbers for `count` images, of which the first two meet the ends of every range."""
    numbers = draws(3, torch.arange(count), 0)
    numbers[0], numbers[1] = 0.0, LAST
    return numbers


def pictures(count: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(height + channels)
    return (torch.rand(count, channels, height, width, generator=random, dtype=torch.float64) * 2 - 1).to(dtype)


def by_hand(image: np.ndarray, policy: list[str], u: np.ndarray) -> np.ndarray:
    """One (C, H, W) image, one operation after the other, as the authors' code has them."""
    image = image.copy()
    height, width = image.shape[1:]
    for name in policy:
        if name == "color":
            colours = image[:3]
            colours = colours + (u[0] - 0.5)
            gray = colours.mean(0, keepdims=True)
            colours = (colours - gray) * (u[1] * 2) + gray
            middle = colours.mean()
            image[:3] = (colours - middle) * (u[2] + 0.5) + middle
        if name == "translation":
            moved = np.zeros_like(image)
            most_y, most_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
            down = list(range(-most_y, most_y + 1))[int(u[3] * (2 * most_y + 1))]
            right = list(range(-most_x, most_x + 1))[int(u[4] * (2 * most_x + 1))]
            for y in range(height):
                for x in range(width):
                    if 0 <= y - down < height and 0 <= x - right < width:
                        moved[:, y, x] = image[:, y - down, x - right]
            image = moved
        if name == "cutout":
            long_y, long_x = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
            middle_y = int(u[5] * (height + 1 - long_y % 2))
            middle_x = int(u[6] * (width + 1 - long_x % 2))
            for y in range(middle_y - long_y // 2, middle_y - long_y // 2 + long_y):
                for x in range(middle_x - long_x // 2, middle_x - long_x // 2 + long_x):
                    if 0 <= y < height and 0 <= x < width:
                        image[:, y, x] = 0
    return image


@pytest.mark.parametrize("policy", [["color"], ["translation"], ["cutout"], POLICY, POLICY[::-1]], ids="-".join)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 16), (4, 12, 20), (3, 9, 8)], ids=str)
def test_it_does_what_the_paper_says(policy: list[str], shape: tuple[int, int, int]) -> None:
    images, numbers = pictures(12, *shape), drawn(12)
    expected = np.stack([by_hand(x, policy, u) for x, u in zip(images.numpy(), numbers.double().numpy(), strict=True)])
    torch.testing.assert_close(diffaugment(images, policy, numbers), torch.from_numpy(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_are_kept(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images = pictures(8, 3, 16, 16, dtype).contiguous(memory_format=memory_format)
    before = images.clone()
    for policy in (*([name] for name in POLICY), POLICY):
        done = diffaugment(images, policy, drawn(8))
        assert done.dtype == dtype
        assert done.stride() == images.stride(), policy
        exact = diffaugment(images.double(), policy, drawn(8))
        # One rounding of the colours, which stay below 4.
        assert (done.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps, policy
    assert torch.equal(images, before)


def test_the_gradient_passes_through_twice() -> None:
    images, numbers = pictures(4, 3, 4, 6).requires_grad_(), drawn(4)

    def augmented(x: Tensor) -> Tensor:
        return diffaugment(x, POLICY, numbers) ** 2  # squared, so that the second gradient is not 0

    assert torch.autograd.gradcheck(augmented, images)
    assert torch.autograd.gradgradcheck(augmented, images)


def test_an_image_meets_the_same_whoever_else_is_in_the_batch() -> None:
    images, numbers = pictures(8, 3, 16, 16), drawn(8)
    whole = diffaugment(images, POLICY, numbers)
    assert torch.equal(diffaugment(images[2:5], POLICY, numbers[2:5]), whole[2:5])


def test_no_policy_leaves_the_images_alone_and_none_changes_anothers_draws() -> None:
    images, numbers = pictures(8, 3, 16, 16), drawn(8)
    assert diffaugment(images, [], numbers) is images
    other = numbers.clone()
    other[:, :3], other[:, 5:] = 0.25, 0.75
    assert torch.equal(diffaugment(images, ["translation"], other), diffaugment(images, ["translation"], numbers))


def test_shifts_and_cuts_are_uniform_over_all_there_are() -> None:
    count = 6_800
    marks = torch.zeros(count, 1, 64, 64)
    marks[:, :, 32, 32] = 1
    place = diffaugment(marks, ["translation"], draws(1, torch.arange(count), 0)).flatten(1).argmax(1)
    for axis in (place // 64, place % 64):
        assert axis.min() == 32 - 8
        assert axis.max() == 32 + 8
        assert torch.bincount(axis)[24:].sub(count / 17).abs().max() < 5 * (count / 17) ** 0.5
    kept = diffaugment(torch.ones(count, 1, 8, 8), ["cutout"], draws(1, torch.arange(count), 0))[:, 0]
    lengths = (kept.amin(2) == 0).sum(1)
    # The middle is at 0 .. 8: half of the window of 4 is there at the ends, all of it between.
    for length, chance in ((2, 2 / 9), (3, 2 / 9), (4, 5 / 9)):
        assert abs((lengths == length).float().mean() - chance) < 0.02


def test_draws_depend_on_seed_number_and_part_and_on_nothing_else() -> None:
    numbers = torch.arange(100, 108)
    whole = draws(5, numbers, 1)
    assert whole.shape == (8, NUM_DRAWS)
    assert whole.dtype == torch.float32
    assert torch.equal(draws(5, numbers[3:6], 1), whole[3:6])
    everything = torch.cat([draws(seed, numbers, part).flatten() for seed in (5, 6) for part in range(3)])
    assert len(everything.unique()) == len(everything)
    many = draws(5, torch.arange(20_000), 2)
    assert many.min() >= 0
    assert many.max() < 1
    assert (many.mean(0) - 0.5).abs().max() < 0.01


def test_every_name_that_the_settings_know_is_there() -> None:
    from typing import get_args, get_type_hints

    from pipeline.config import DiscriminatorInputConfig

    (names,) = get_args(get_type_hints(DiscriminatorInputConfig)["augment"])
    assert set(get_args(names)) == set(AUGMENTATIONS)
