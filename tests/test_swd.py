"""SWD and MS-SSIM against slow definitions.

The definitions here are written another way than the pipeline's: by whole 2-D filters, image by image and patch by
patch, in float64, without blocks or threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.metrics import ms_ssim, swd
from pipeline.metrics.wasserstein import mean_gap

FLOAT32 = 1e-5
"""Relative: projections are float32 sums of up to 196 products (4e-6), and their differences average."""

FLOAT64 = 1e-12
"""Relative: float64's rounding through some thousand additions."""


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2, thread_name_prefix="metrics") as threads:
        yield threads


def pictures(count: int, height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """(count, height, width, channels) uint8: smooth colours under noise, as different as photographs are."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    slopes = random.normal(0, 80, (3, count, 1, 1, channels))
    smooth = 128 + slopes[0] + slopes[1] * (y[..., None] - 0.5) + slopes[2] * (x[..., None] - 0.5)
    return np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


# SWD


def levels_apart(one: np.ndarray, other: np.ndarray, pool: Executor, step: int = 64) -> list[float]:
    """1000 times the distance at each level, as an evaluation puts it together."""
    count, *size = one.shape
    onto, found = swd.directions(size[2]), []
    for level in range(len(swd.level_sizes(*size[:2]))):
        sides = [swd.Patches(lambda a, b, s=s: s[a:b], count, tuple(size), level, pool) for s in (one, other)]
        apart = []
        for start in range(0, swd.DIRECTIONS, step):
            apart += swd.distances(*sides, onto[start : start + step], pool)
        found.append(1e3 * float(np.mean(apart)))
    return found


BLUR = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def filtered(plane: np.ndarray) -> np.ndarray:
    """A 2-D filter by its definition, the borders mirrored."""
    padded = np.pad(plane, 2, mode="reflect")
    out = np.zeros_like(plane)
    for dy, dx in np.ndindex(5, 5):
        out += BLUR[dy, dx] * padded[dy : dy + plane.shape[0], dx : dx + plane.shape[1]]
    return out


def laplacian(plane: np.ndarray, count: int) -> list[np.ndarray]:
    levels = [plane]
    for _ in range(count - 1):
        fine = levels[-1]
        coarse = filtered(fine)[::2, ::2]
        spread = np.zeros_like(fine)
        spread[::2, ::2] = coarse
        levels[-1] = fine - 4 * filtered(spread)
        levels.append(coarse)
    return levels


def slow_swd(one: np.ndarray, other: np.ndarray) -> list[float]:
    """1000 times the distance at each level: everything at once, in float64."""
    sizes = swd.level_sizes(*one.shape[1:3])
    onto = swd.directions(one.shape[3]).astype(np.float64)
    found = []
    for level in range(len(sizes)):
        sorted_sides = []
        for side in (one, other):
            cut = []
            tops, lefts = swd.Pyramid(*one.shape[1:3], level).corners(0, len(side))
            for image, image_tops, image_lefts in zip(side.astype(np.float64), tops, lefts, strict=True):
                planes = [laplacian(plane, len(sizes))[level] for plane in np.moveaxis(image, 2, 0)]
                seen = np.stack(planes, axis=-1)
                cut += [seen[t : t + 7, left : left + 7] for t, left in zip(image_tops, image_lefts, strict=True)]
            patches = np.stack(cut)
            patches -= patches.mean((0, 1, 2))
            patches /= patches.std((0, 1, 2))
            sorted_sides.append(np.sort(patches.reshape(len(patches), -1) @ onto.T, axis=0))
        found.append(1e3 * float(np.abs(sorted_sides[0] - sorted_sides[1]).mean()))
    return found


@pytest.mark.parametrize(("height", "width", "channels"), [(64, 64, 3), (32, 48, 1), (48, 24, 4), (8, 12, 3)])
def test_swd_is_what_its_definition_says(pool, height, width, channels):
    one, other = pictures(5, height, width, channels), pictures(5, height, width, channels, seed=1)
    np.testing.assert_allclose(levels_apart(one, other, pool), slow_swd(one, other), rtol=FLOAT32)


ROWS = {
    "normal": lambda random, n: random.standard_normal(n),
    "shifted": lambda random, n: random.standard_normal(n) + 0.1,
    "wider": lambda random, n: 2 * random.standard_normal(n),
    "far": lambda random, n: random.standard_normal(n) + 100,
    "ties": lambda random, n: random.integers(-4, 5, n),
    "outliers": lambda random, n: random.standard_cauchy(n),
    "constant": lambda random, n: np.full(n, 3.0),
}


@pytest.mark.parametrize("count", [1, 2, 3, 100, 70_000])
def test_the_mean_gap_is_that_of_the_sorted_rows(count):
    random = np.random.default_rng(count)
    for first in ROWS.values():
        one = first(random, count).astype(np.float32)
        assert mean_gap(one, random.permutation(one)) == 0
        for second in ROWS.values():
            other = second(random, count).astype(np.float32)
            expected = np.abs(np.sort(one.astype(np.float64)) - np.sort(other.astype(np.float64))).mean()
            # A value is placed in its bin by float32, and may come into the next one's.
            assert mean_gap(one, other) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_most_of_two_rows_is_never_sorted(monkeypatch):
    random = np.random.default_rng(0)
    one, other = (random.standard_normal(70_000).astype(np.float32) + shift for shift in (0, 0.02))
    expected = np.abs(np.sort(one) - np.sort(other)).mean(dtype=np.float64)
    lengths, lexsort = [], np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: lengths.append(len(keys[0])) or lexsort(keys))
    monkeypatch.setattr(np, "sort", lambda row: pytest.fail("sorted"))
    assert mean_gap(one, other) == pytest.approx(expected, rel=1e-6)
    assert lengths
    assert max(lengths) < 0.25 * 140_000


def test_there_are_levels_down_to_16_pixels_and_at_least_one():
    assert swd.level_sizes(64, 64) == [(64, 64), (32, 32), (16, 16)]
    assert swd.level_sizes(128, 64) == [(128, 64), (64, 32), (32, 16)]
    assert [len(swd.level_sizes(side, side)) for side in (8, 16, 24, 32, 128)] == [1, 1, 1, 2, 4]


def test_the_levels_of_a_pyramid_add_up_to_the_image():
    images = pictures(3, 64, 32, 3)
    fine, coarse = (swd.Pyramid(64, 32, level).images(images) for level in (0, 1))
    spread = np.zeros(images.shape)
    spread[:, ::2, ::2] = coarse
    for image, levels, between in zip(images, fine, spread, strict=True):
        whole = np.stack([4 * filtered(plane) for plane in np.moveaxis(between, 2, 0)], axis=-1) + levels
        np.testing.assert_allclose(whole, image, rtol=0, atol=255 * 1e-6)


def test_equal_sets_are_0_apart_and_noise_drives_them_apart(pool):
    images = pictures(8, 32, 32, 3)
    assert levels_apart(images, images.copy(), pool) == [0.0, 0.0]
    noise = np.random.default_rng(5).normal(0, 1, images.shape)
    steps = [np.clip(images + strength * noise, 0, 255).astype(np.uint8) for strength in (4, 16, 64)]
    apart = [np.mean(levels_apart(images, noisy, pool)) for noisy in steps]
    assert apart[0] < apart[1] < apart[2]


def test_a_set_of_one_colour_has_a_distance_too(pool):
    flat = np.full((4, 16, 16, 3), 128, np.uint8)
    (apart,) = levels_apart(pictures(4, 16, 16, 3), flat, pool)
    assert math.isfinite(apart)
    assert apart > 100


def test_memory_blocks_and_threads_change_nothing(pool, monkeypatch):
    one, other = pictures(70, 16, 16, 3), pictures(70, 16, 16, 3, seed=1)  # a chunk and a part of one
    held = levels_apart(one, other, pool)
    with ThreadPoolExecutor(1) as alone:
        assert levels_apart(one, other, alone) == held
    np.testing.assert_allclose(levels_apart(one, other, pool, step=32), held, rtol=1e-6)
    monkeypatch.setattr(swd, "SET_BYTES", 1 << 20)
    assert swd.held_bytes(70, 3) == 0
    assert swd.block_size(70, 3) == 16
    np.testing.assert_allclose(levels_apart(one, other, pool), held, rtol=1e-6)


def test_of_50000_images_a_set_takes_what_it_may():
    assert swd.held_bytes(5_000, 3) > 0
    assert swd.block_size(5_000, 3) == 64
    assert swd.held_bytes(50_000, 3) == 0
    assert swd.block_size(50_000, 3) * 50_000 * swd.PATCHES * 4 <= swd.SET_BYTES


def test_patches_are_a_function_of_image_number_and_level_and_come_from_everywhere():
    pyramid = swd.Pyramid(16, 24, 0)
    top, left = pyramid.corners(0, 300)
    some = pyramid.corners(120, 125)
    assert np.array_equal(some[0], top[120:125])
    assert np.array_equal(some[1], left[120:125])
    places = np.bincount((top * 18 + left).ravel(), minlength=10 * 18)
    assert len(places) == 10 * 18
    expected = 300 * swd.PATCHES / len(places)
    assert (np.square(places - expected) / expected).sum() < 280  # chi-squared of 179: above it once in a million
    finer, coarser = (swd.Pyramid(64, 64, level).corners(0, 4)[0] / (58, 26)[level] for level in (0, 1))
    assert abs(np.corrcoef(finer.ravel(), coarser.ravel())[0, 1]) < 0.2


def test_directions_are_unit_vectors_that_point_everywhere():
    onto = swd.directions(3).astype(np.float64)
    assert onto.shape == (512, 147)
    np.testing.assert_allclose(np.linalg.norm(onto, axis=1), 1, rtol=1e-6)
    overlap = onto @ onto.T - np.eye(512)
    assert abs(overlap).max() < 0.5
    assert abs(np.square(overlap).sum() / (512 * 511) - 1 / 147) < 1e-4


# MS-SSIM


def slow_ssim(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean contrast term and mean similarity of two (H, W) float64 images, window by window."""
    size = min(11, *a.shape)
    place = np.arange(size) - (size - 1) / 2
    window = np.exp(-0.5 * (place[:, None] ** 2 + place[None, :] ** 2) / (1.5 * size / 11) ** 2)
    window /= window.sum()
    contrasts, similarities = [], []
    for top, left in np.ndindex(a.shape[0] - size + 1, a.shape[1] - size + 1):
        x, y = (image[top : top + size, left : left + size] for image in (a, b))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        vxy = (window * (x - mx) * (y - my)).sum()
        contrast = (2 * vxy + (0.03 * 255) ** 2) / (vx + vy + (0.03 * 255) ** 2)
        contrasts.append(contrast)
        similarities.append(contrast * (2 * mx * my + (0.01 * 255) ** 2) / (mx**2 + my**2 + (0.01 * 255) ** 2))
    return float(np.mean(contrasts)), float(np.mean(similarities))


def slow_ms_ssim(a: np.ndarray, b: np.ndarray, weights: list[float]) -> float:
    """Of two (H, W, C) images."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    whole = 1.0
    for scale, weight in enumerate(weights):
        terms = [slow_ssim(a[..., c], b[..., c]) for c in range(a.shape[2])]
        contrast, similarity = np.mean(terms, axis=0)
        whole *= max(similarity if scale == len(weights) - 1 else contrast, 0) ** weight
        a, b = ((i[::2, ::2] + i[1::2, ::2] + i[::2, 1::2] + i[1::2, 1::2]) / 4 for i in (a, b))
    return whole


@pytest.mark.parametrize(
    ("height", "width", "channels", "weights"),
    [
        (64, 64, 3, [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]),
        (32, 48, 1, [0.0448 / 0.8668, 0.2856 / 0.8668, 0.3001 / 0.8668, 0.2363 / 0.8668]),
        (24, 16, 4, [0.0448 / 0.6305, 0.2856 / 0.6305, 0.3001 / 0.6305]),
        (8, 8, 3, [0.0448 / 0.3304, 0.2856 / 0.3304]),
    ],
)
def test_ms_ssim_is_what_its_definition_says(height, width, channels, weights):
    one = pictures(2, height, width, channels)
    other = np.clip(one + np.random.default_rng(3).normal(0, 25, one.shape), 0, 255).astype(np.uint8)
    expected = [slow_ms_ssim(a, b, weights) for a, b in zip(one, other, strict=True)]
    assert all(0.1 < value < 0.99 for value in expected)
    np.testing.assert_allclose(ms_ssim.ms_ssim(one, other), expected, rtol=1e-9)  # variances lose three digits
    np.testing.assert_allclose(ms_ssim.scale_weights(height, width), weights, rtol=FLOAT64)


def test_equal_images_have_ms_ssim_1_and_others_less():
    images = pictures(6, 64, 64, 3)
    assert ms_ssim.ms_ssim(images, images).tolist() == [1.0] * 6
    assert (ms_ssim.ms_ssim(images, images[::-1]) < 0.9).all()
    assert ms_ssim.ms_ssim(images[:1], 255 - images[:1]) >= 0  # a negative likeness counts as none


def test_pairs_use_each_image_once_and_are_drawn_anew_by_nobody():
    found = ms_ssim.pairs(41)
    assert found.shape == (20, 2)
    assert len(set(found.ravel().tolist())) == 40
    assert np.array_equal(found, ms_ssim.pairs(41))
    assert (abs(found[:, 0] - found[:, 1]) > 1).mean() > 0.8  # neighbours in a dataset are alike


def test_similarities_are_those_of_the_pairs_named(pool):
    images = pictures(9, 16, 16, 3)
    which = np.array([[0, 3], [8, 1], [2, 2]])
    found = ms_ssim.similarities(lambda a, b: images[a:b], which, pool)
    expected = [float(ms_ssim.ms_ssim(images[a : a + 1], images[b : b + 1])[0]) for a, b in which]
    np.testing.assert_allclose(found, expected, rtol=FLOAT64)
    assert len(ms_ssim.similarities(lambda a, b: images[a:b], which[:0], pool)) == 0
