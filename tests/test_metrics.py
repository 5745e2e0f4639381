"""SWD and MS-SSIM against slow definitions, the real side that is kept, and an evaluation on one rank and on two.

The definitions here are written another way than the pipeline's: by whole 2-D filters, image by image and patch by
patch, in float64, without blocks or threads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.cache import build_cache
from pipeline.config import METRICS, Config, ConfigError, DataConfig, EvalConfig, ModelConfig
from pipeline.decode.pillow import decode
from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.face_set import write_faces
from pipeline.index import open_dataset
from pipeline.metrics import ms_ssim, real_side, swd, through_inception
from pipeline.metrics.evaluation import Evaluation, weights_path
from pipeline.metrics.gathering import gathered, shares
from pipeline.metrics.inception import SHA256
from pipeline.metrics.real_side import RealSide
from pipeline.metrics.wasserstein import mean_gap
from pipeline.models import Generator
from pipeline.sampling import recalibrated
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
PHOTOGRAPHS = 24

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


# The real side


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "faces"
    write_faces(folder, PHOTOGRAPHS, seed=1, workers=1)
    return folder


def settings(photographs: Path, cache: Path, **data: object) -> Config:
    plain = {"dataroot": str(photographs), "cache_dir": str(cache), "image_size": 16, "decoder": "pillow"}
    return Config(data=DataConfig(**plain | data), model=ModelConfig(nz=8, ngf=4, ndf=4))


def opened(cfg: Config, count: int = 10, told: list[str] | None = None, ranks: Ranks = ALONE, **more: object):
    return RealSide(
        cfg.data, open_dataset(cfg.data), ranks, num_images=count, decoder="pillow", cached=None, samples=None,
        threads=1, say=(told if told is not None else []).append, **more,
    )  # fmt: skip


def test_real_images_are_a_fixed_choice_as_training_crops_them(photographs, tmp_path):
    cfg = settings(photographs, tmp_path, crop_margin=4, flip=True, brightness=0.5)
    real = opened(cfg)
    real.open()
    assert len(set(real.items.tolist())) == 10
    assert list(real.items) == sorted(real.items)
    assert list(real.items) != list(range(10))
    dataset = open_dataset(cfg.data)
    for number, item in enumerate(real.items.tolist()):
        window = decode(dataset.read(item), dataset.size(item), (20, 20), 3, "")
        assert np.array_equal(real.images(number, number + 1)[0], window[2:18, 2:18])


def test_the_cache_of_decoded_images_gives_the_same_pixels(photographs, tmp_path):
    cfg = settings(photographs, tmp_path, crop_margin=3)
    dataset = open_dataset(cfg.data)
    decoded = opened(cfg)
    decoded.open()
    for kind in ("host", "device"):
        cached = build_cache(cfg.data, dataset, decoder="pillow", kind=kind, device=CPU, threads=1)
        real = RealSide(
            cfg.data, dataset, ALONE, num_images=10, decoder="pillow", cached=cached, samples=None, threads=1, say=print
        )
        real.open()
        assert np.array_equal(real.images(2, 9), decoded.images(2, 9))
        assert not isinstance(real.images(2, 9), torch.Tensor)


def test_what_was_worked_out_is_kept_until_something_it_depends_on_changes(photographs, tmp_path):
    made: list[int] = []

    def build() -> dict[str, np.ndarray]:
        made.append(1)
        return {"value": np.arange(3.0)}

    cfg = settings(photographs, tmp_path)
    assert opened(cfg).shared("thing", build, size=1)["value"].tolist() == [0, 1, 2]
    assert opened(cfg).shared("thing", build, size=1)["value"].tolist() == [0, 1, 2]
    assert len(made) == 1
    opened(cfg).shared("thing", build, size=2)
    opened(cfg, count=11).shared("thing", build, size=1)
    for other in ({"image_size": 24}, {"nc": 1}, {"crop_margin": 2}):
        opened(settings(photographs, tmp_path, **other)).shared("thing", build, size=1)
    assert len(made) == 6
    opened(settings(photographs, tmp_path, flip=True, hue=10.0)).shared("thing", build, size=1)
    assert len(made) == 6, "mirroring and colour are no part of what is measured"


@pytest.mark.parametrize("harm", ["cut short", "a bit", "no archive", "empty"])
def test_what_is_damaged_is_made_again_with_a_line(photographs, tmp_path, harm):
    cfg, told = settings(photographs, tmp_path), []
    real = opened(cfg, told=told)
    value = np.random.default_rng(0).bytes(4000)
    real.keep("thing", {"value": np.frombuffer(value, np.uint8)}, size=1)
    (path,) = (tmp_path / "evaluation").iterdir()
    content = bytearray(path.read_bytes())
    content[2000] ^= 16
    path.write_bytes({"cut short": content[:3000], "a bit": content, "no archive": b"x" * 99, "empty": b""}[harm])
    assert real.load("thing", size=1) is None
    assert [str(path) in line and "damaged" in line and "\n" not in line for line in told] == [True]
    found = real.shared("thing", lambda: {"value": np.frombuffer(value, np.uint8)}, size=1)
    assert found["value"].tobytes() == value
    kept = real.load("thing", size=1)
    assert kept is not None
    assert kept["value"].tobytes() == value
    assert [p.name for p in (tmp_path / "evaluation").iterdir()] == [path.name]


def test_a_disk_without_room_stops_nobody(photographs, tmp_path, monkeypatch):
    cfg, told = settings(photographs, tmp_path), []
    real = opened(cfg, told=told)
    monkeypatch.setattr(real_side, "_SPARE_DISK", 1 << 60)
    assert real.shared("thing", lambda: {"value": np.zeros(3)})["value"].tolist() == [0, 0, 0]
    assert ["cannot be kept" in line for line in told] == [True]
    assert real.load("thing") is None


# Evaluation


class Fake:
    """In Inception's place: a few features and logits that are sums of pixels with signs; 2048 take 20 s for FID."""

    name = "fake"

    def __init__(self) -> None:
        through_inception.FEATURES, through_inception.LOGITS = 12, 5
        random = torch.Generator().manual_seed(1)
        self.features = torch.randn(16 * 16 * 3, 12, generator=random)
        self.logits = torch.randn(16 * 16 * 3, 5, generator=random)
        self.seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        flat = images.flatten(1).float() / 255
        return (flat @ self.features).relu(), flat @ self.logits / 20


@pytest.fixture(autouse=True)
def inceptions_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back after a Fake."""
    for name in ("FEATURES", "LOGITS"):
        monkeypatch.setattr(through_inception, name, getattr(through_inception, name))


def evaluation(cfg: Config, metrics: tuple[str, ...], count: int = 20, ranks: Ranks = ALONE, **more: object):
    return Evaluation(
        cfg, open_dataset(cfg.data), ranks, metrics=metrics, num_images=count, decoder="pillow", cached=None,
        batch=4, **more,
    )  # fmt: skip


def generator(strength: float = 1.0) -> nn.Module:
    torch.manual_seed(4)
    found = Generator(8, 4, 3, 16, 16)
    for parameter in found.parameters():
        nn.init.normal_(parameter, 0.0, 0.4 * strength)
    return recalibrated(found, 8, images=64, batch=32)


def test_all_metrics_are_measured_and_nothing_random_is_touched(photographs, tmp_path):
    cfg = settings(photographs, tmp_path)
    measured = evaluation(cfg, tuple(METRICS), extractor=Fake(), threads=2)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()
    model = generator()
    torch.set_rng_state(before)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    found = measured.measure(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_before, strict=True))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert list(found) == [
        "swd", "swd_16", "ms_ssim", "ms_ssim_real", "fid", "kid", "kid_std", "inception_score", "inception_score_std",
        "precision", "recall", "density", "coverage",
    ]  # fmt: skip
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found["swd"] == found["swd_16"] > 10
    assert 0 < found["ms_ssim"] < 1
    assert measured.measure(model) == found, "equal weights give equal figures"
    assert measured.measure(generator(0.3))["swd"] != found["swd"]


def test_a_generator_that_gives_back_the_photographs_is_0_apart(photographs, tmp_path):
    measured = evaluation(settings(photographs, tmp_path), tuple(METRICS), extractor=Fake())
    measured.real.open()
    real = torch.from_numpy(measured.real.images(0, 20).copy())
    found = measured.measure(Recited(real))
    assert found["swd"] == 0
    assert found["ms_ssim"] == found["ms_ssim_real"]
    assert found["fid"] < 1e-4
    assert found["kid"] < 1e-6
    assert [found[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]


class Recited(nn.Module):
    """Gives these (N, H, W, 3) uint8 images one after another, whatever the latents are."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.next = images, 0
        self.eval()

    def forward(self, latents: Tensor) -> Tensor:
        part = self.images[self.next : self.next + len(latents)]
        self.next += len(latents)
        return part.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_a_second_evaluation_looks_at_the_real_images_no_more(photographs, tmp_path, monkeypatch):
    cfg, model = settings(photographs, tmp_path), generator()
    first = evaluation(cfg, tuple(METRICS), extractor=Fake()).measure(model)
    extractor = Fake()
    again = evaluation(cfg, tuple(METRICS), extractor=extractor)
    monkeypatch.setattr(RealSide, "_decode", lambda self: pytest.fail("decoded again"))
    assert again.measure(model) == first
    assert extractor.seen == 20, "the generated ones only"


def test_other_channels_and_shapes_are_measured_too(photographs, tmp_path):
    for data in ({"nc": 1, "image_size": [32, 48]}, {"nc": 4, "image_size": 32}):
        cfg = settings(photographs, tmp_path, **data)
        torch.manual_seed(0)
        model = recalibrated(Generator(8, 4, cfg.data.nc, *cfg.data.size), 8, images=32)
        found = evaluation(cfg, ("swd", "ms_ssim")).measure(model)
        assert list(found) == ["swd", "swd_32", "swd_16", "ms_ssim", "ms_ssim_real"]
        assert all(math.isfinite(value) for value in found.values())


def test_what_cannot_be_measured_is_refused_before_anything_is_done(photographs, tmp_path):
    cfg = settings(photographs, tmp_path)
    with pytest.raises(ConfigError, match=r"at most the 24 images of data\.dataroot, got 25"):
        evaluation(cfg, ("swd",), count=25)
    with pytest.raises(ConfigError, match=r"data\.nc is 1, since Inception takes RGB only, got 'fid'"):
        evaluation(settings(photographs, tmp_path, nc=1), ("swd", "fid"), extractor=Fake())
    with pytest.raises(ConfigError, match=r"at least 10 for inception_score, got 9"):
        evaluation(cfg, ("inception_score",), count=9, extractor=Fake())
    with pytest.raises(DataError, match=r"put it at .*/inception-2015-12-05\.pth"):
        evaluation(cfg, ("kid",))
    other = tmp_path / "weights.pth"
    other.write_bytes(b"something else")
    wrong = dataclasses.replace(cfg, eval=EvalConfig(inception_weights=str(other)))
    assert weights_path(wrong) == other
    with pytest.raises(DataError, match=f"weights.pth must be .*{SHA256}, got [0-9a-f]{{64}}"):
        evaluation(wrong, ("kid",))
    assert not (tmp_path / "evaluation").exists()


# Ranks


def test_shares_are_each_number_once_in_chunks_that_do_not_depend_on_the_ranks():
    for world_size in (1, 2, 3, 7):
        of_all = [shares(21, Ranks(r, world_size, r, world_size, CPU), 4) for r in range(world_size)]
        assert len({len(part) for part in of_all}) == 1
        chunks = sorted((c.start, c.stop) for part in of_all for c in part if len(c))
        assert chunks == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]


def two_ranks(ranks: Ranks, photographs: str, cache: str, alone: dict[str, float], folder: str) -> None:
    """Gathering, then all metrics with a real side of its own, then with the one that was kept."""
    whole = gathered(
        lambda share: torch.arange(share.start, share.stop)[:, None].repeat(1, 3), 21, ranks,
        torch.empty((0, 3), dtype=torch.int64), chunk=4,
    )  # fmt: skip
    assert torch.equal(whole, torch.arange(21)[:, None].repeat(1, 3))
    for place in (folder, folder, cache):
        cfg = settings(Path(photographs), Path(place))
        found = evaluation(cfg, tuple(METRICS), ranks=ranks, extractor=Fake()).measure(generator())
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert abs(found[name] - value) <= 1e-6 * max(1, abs(value)), (name, value, found[name])


def test_two_ranks_measure_what_one_does(photographs, tmp_path):
    cache = tmp_path / "one"
    alone = evaluation(settings(photographs, cache), tuple(METRICS), extractor=Fake()).measure(generator())
    open_dataset(settings(photographs, tmp_path / "two").data)
    run_ranks(two_ranks, 2, str(photographs), str(cache), alone, str(tmp_path / "two"))
    assert sorted(p.name for p in (tmp_path / "two/evaluation").iterdir()) == sorted(
        p.name for p in (cache / "evaluation").iterdir()
    )
