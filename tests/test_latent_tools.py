"""Truncation, sums of latents, and the search for a photograph's latent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline import latent_tools
from pipeline.config import ConfigError, DataConfig
from pipeline.errors import DataError
from pipeline.feed import open_feed
from pipeline.index import open_dataset
from pipeline.latent_tools import Term, figure, neighbours, parse_sum, total, truncated
from pipeline.models import Generator, initialise
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.projection import bands, distance, project, read_photograph
from pipeline.sampling import generate, latents, recalibrated
from tests.images import bad_images, odd_images

NZ = 12


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_truncation_has_the_distribution_of_drawing_again_until_inside(threshold: float) -> None:
    z = latents(3, Stream.SAMPLE_LATENT, 0, 2000, 50)
    cut = truncated(z, threshold).flatten()
    assert cut.abs().max() <= threshold
    random = torch.Generator().manual_seed(0)
    again = torch.randn(400_000, generator=random)
    again = again[again.abs() <= threshold][: len(cut)].sort().values
    n, m = len(cut), len(again)
    below = torch.searchsorted(again, cut.sort().values) / m
    assert (below - (torch.arange(n) + 0.5) / n).abs().max() < 2 * (1 / n + 1 / m) ** 0.5  # Kolmogorov and Smirnov


def test_truncation_keeps_order_and_sign_and_ends_at_no_truncation() -> None:
    z = torch.linspace(-9, 9, 2001)[None]
    cut = truncated(z, 1.5)
    assert (cut[0, 1:] >= cut[0, :-1]).all()
    torch.testing.assert_close(cut, -truncated(-z, 1.5), rtol=0, atol=0)
    torch.testing.assert_close(truncated(z, 1e6), z)
    assert truncated(torch.tensor([[0.0, 40.0, -40.0]]), 1.5).tolist() == [[0.0, 1.5, -1.5]]


def test_a_sum_is_read() -> None:
    assert parse_sum("7") == [Term(1, (7,))]
    assert parse_sum(" 0,3 , 5-1,2 + 7") == [Term(1, (0, 3, 5)), Term(-1, (1, 2)), Term(1, (7,))]


@pytest.mark.parametrize(
    "text", ["", " ", "1,", "1 - ", "-1", "1 -- 2", "a", "1.5", "1|2", "1 2", "²", "9" * 19, "1_0", "1 * 2"]
)
def test_what_is_no_sum_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--arithmetic must be like"):
        parse_sum(text)


def test_a_sum_of_too_many_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 64 sample numbers, got 65"):
        parse_sum(",".join(["1"] * 65))


def test_the_sum_and_its_neighbours() -> None:
    means = torch.randn(3, NZ)
    added = total(parse_sum("0 - 1 + 2"), means)
    torch.testing.assert_close(added, means[0] - means[1] + means[2])
    around = neighbours(added, seed=4)
    assert around.shape == (9, NZ)
    assert torch.equal(around[4], added)
    noise = (around - added)[[0, 1, 2, 3, 5, 6, 7, 8]]
    assert noise.abs().max() <= 0.25 + 1e-6
    assert noise.abs().mean() > 0.1
    assert len(around.unique(dim=0)) == 9
    assert torch.equal(neighbours(added, seed=4), around)
    assert not torch.equal(neighbours(added, seed=5), around)
    many = torch.cat([neighbours(torch.zeros(400), seed)[:4] for seed in range(20)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 0.5 / 12**0.5) < 0.005


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_figure_has_every_picture_in_its_place(channels: int) -> None:
    terms = parse_sum("0,1,2 - 3")
    flat = torch.arange(1, 16, dtype=torch.uint8).view(-1, 1, 1, 1).mul(10).expand(-1, 8, 6, channels)
    samples, means, results = (flat[:3], flat[3:4]), flat[4:6], flat[6:15]
    image = np.asarray(figure(terms, samples, means, results)).reshape(-1, 2 * 22 + 22, channels)
    gap, step = latent_tools.GAP, 6 + 2 * latent_tools.GAP + 12
    low = 3 * (8 + gap) + 2 * gap
    assert image.shape[0] == low + 8
    places = {(0, 0): 10, (0, 10): 20, (0, 20): 30, (step, 20): 40, (0, low): 50, (step, low): 60}
    for row in range(3):
        for column in range(3):
            places[2 * step + column * 8, low - (2 - row) * 10] = 70 + 10 * (3 * row + column)
    for (x, y), value in places.items():
        assert (image[y : y + 8, x : x + 6] == value).all(), (x, y)
    assert (image[0, step:, :3] == 255).all()  # nothing above a shorter column


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (12, 20), (9, 16)])
def test_the_bands_add_up_to_the_picture(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    found = list(bands(images))
    added = found[-1]
    for band in found[-2::-1]:
        added = band + F.interpolate(added, size=band.shape[2:], mode="nearest")
    torch.testing.assert_close(added, images)
    assert len(found) == {(64, 64): 5, (16, 24): 3, (12, 20): 2, (9, 16): 1}[size]


def test_the_distance_is_nothing_for_equals_and_known_for_a_shift_in_brightness() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert distance(images, images).tolist() == [0.0, 0.0]
    torch.testing.assert_close(distance(images + 0.5, images), torch.full((2,), 0.25 + 0.5))
    stripes = 0.5 * torch.tensor([1.0, -1.0]).repeat(8).expand(2, 3, 16, 16)
    torch.testing.assert_close(distance(images + stripes, images), torch.full((2,), 0.25 + 0.5))


def small() -> torch.nn.Module:
    generator = Generator(NZ, 8, 3, 16, 16)
    initialise(generator, torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator.layers[-1].weight.mul_(10)  # pictures that use the whole range
    return recalibrated(generator, NZ, images=256)


def test_what_the_generator_has_drawn_is_found_again() -> None:
    generator = small()
    z = latents(9, Stream.FIXED_LATENT, 0, 3, NZ)
    photographs, candidates = generate(generator, z), latents(0, Stream.SAMPLE_LATENT, 0, 64, NZ)
    done = []
    found = project(generator, photographs, candidates, steps=80, batch=8, after=done.append)
    assert done == [2, 3]
    drawn = generate(generator, candidates).double()
    nearest = torch.stack([(drawn - p.double()).abs().mean((1, 2, 3)).min() for p in photographs])
    assert (found.errors < 0.2 * nearest).all(), (found.errors, nearest)
    assert (found.pictures.int() - generate(generator, found.latents).int()).abs().max() <= 1
    assert (found.latents.norm(dim=1) / NZ**0.5 - 1).abs().max() < 0.5
    assert all(p.grad is None for p in generator.parameters())
    again = project(generator, photographs, candidates, steps=80, batch=8)
    assert torch.equal(again.latents, found.latents)
    more = project(generator, photographs[:2], candidates, steps=160, batch=8)
    assert (more.errors <= found.errors[:2] + 0.5).all()


def test_a_photograph_is_cut_as_in_training(tmp_path: Path) -> None:
    files = odd_images(tmp_path / "odd")
    for nc, margin in ((3, 0), (4, 0), (1, 0), (3, 8)):
        whole = DataConfig(dataroot=str(tmp_path / "odd"), cache_dir=str(tmp_path / "cache"), image_size=32, nc=nc)
        for name in ("exif_rotated", "palette_transparent", "gray16", "cmyk"):
            alone = tmp_path / name / files[name].name
            alone.parent.mkdir(exist_ok=True)
            alone.write_bytes(files[name].read_bytes())
            cfg = DataConfig(
                dataroot=str(alone.parent), cache_dir=whole.cache_dir, image_size=32 + margin, nc=nc, decoder="pillow"
            )
            feed = open_feed(
                cfg,
                open_dataset(cfg),
                seed=0,
                shard=Slice(2),
                device=torch.device("cpu"),
                images_seen=0,
                threads=1,
                decoder="pillow",
                cached=None,
            )
            try:
                trained = feed.next()[0, margin // 2 : 32 + margin // 2, margin // 2 : 32 + margin // 2]
            finally:
                feed.close()
            mine = DataConfig(image_size=32, nc=nc, crop_margin=margin)
            assert np.array_equal(read_photograph(files[name], mine), trained.numpy()), (name, nc, margin)


def test_a_photograph_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    files = bad_images(tmp_path)
    for name, path in {**files, "missing": tmp_path / "missing.jpg", "folder": tmp_path}.items():
        if name == "hollow_png" or "header_only" in name:
            continue  # a header and an end, and nothing that a decoder calls wrong
        with pytest.raises(DataError) as caught:
            read_photograph(path, DataConfig(image_size=32))
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_a_large_photograph_is_a_photograph(tmp_path: Path) -> None:
    Image.effect_noise((400, 300), 60).convert("RGB").save(tmp_path / "a.png")
    assert read_photograph(tmp_path / "a.png", DataConfig(image_size=[16, 32])).shape == (16, 32, 3)
