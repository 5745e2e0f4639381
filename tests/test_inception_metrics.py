"""Inception's features and what is computed from them, against torch-fidelity, closed forms and slow definitions.

The published weights are not in the repository.  Random ones stand for them: what is tested is arithmetic.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.config import ConfigError
from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.metrics import inception, manifold
from pipeline.metrics.frechet import Moments, distance
from pipeline.metrics.inception import InceptionFeatures
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kernel_distance import kid
from pipeline.metrics.manifold import precision_recall_density_coverage
from tests.images import portrait
from tests.ranks import run_ranks

PRINTED = 5e-8
"""Relative: torch-fidelity prints seven digits, and half a unit of the last one is at least this."""

FLOAT64 = 1e-12
"""Relative: float64's rounding through some thousand additions, and a decomposition."""

CPU = torch.device("cpu")


def vectors(count: int, dimension: int, seed: int, shift: float = 0.0) -> Tensor:
    """(count, dimension) float32, never below 0 and correlated, as Inception's features are."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=random) / dimension**0.5
    return (torch.randn(count, dimension, generator=random) @ mixing + 0.4 + shift).relu()


def moments_of(features: Tensor) -> Moments:
    moments = Moments.empty(features.shape[1])
    moments.add(features)
    return moments


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    """Moments of a hundred vectors with exactly this mean and covariance."""
    count = 100
    outer = covariance.double() * (count - 1) + count * torch.outer(mean.double(), mean.double())
    return Moments(count, mean.double() * count, outer)


# FID


def fidelity_fid(real: Tensor, fake: Tensor) -> float:
    statistics = [fid_features_to_statistics(features.double()) for features in (fake, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_moments_are_numpys_mean_and_covariance_however_the_vectors_come() -> None:
    features = vectors(300, 24, seed=1)
    moments = Moments.empty(24)
    for part in features.split([1, 0, 199, 100]):
        moments.add(part)
    exact = features.double().numpy()
    assert moments.count == 300
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(0), rtol=FLOAT64)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(exact, rowvar=False), atol=FLOAT64, rtol=0)


def test_fid_is_torch_fidelitys() -> None:
    real, fake = vectors(700, 64, seed=1), vectors(400, 64, seed=2, shift=0.1)
    expected = fidelity_fid(real, fake)
    assert expected > 0.1
    assert distance(moments_of(real), moments_of(fake)) == pytest.approx(expected, rel=PRINTED)


def test_fid_of_independent_numbers_is_the_closed_form() -> None:
    """For diagonal covariances: sum of (m1 - m2)^2 + (s1 - s2)^2."""
    means, deviations = torch.rand(2, 30, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64) + 0.1
    one, other = (gaussian(m, torch.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    exact = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert distance(one, other) == pytest.approx(exact, rel=FLOAT64 * 100)  # differences of sums some 100 as large


def test_fid_holds_its_digits_with_fewer_vectors_than_numbers() -> None:
    """Against the singular values of the centred vectors' products, which need no covariance.

    torch-fidelity's figure, from eigenvalues of the covariances' product, is another from the eighth digit on.
    """
    real, fake = vectors(40, 512, seed=1), vectors(30, 512, seed=2, shift=0.05)
    centred = [((x - x.mean(0)) / (len(x) - 1) ** 0.5).double() for x in (real.double(), fake.double())]
    apart = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    spread = sum(x.square().sum() for x in centred)
    exact = float(apart + spread - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    assert distance(moments_of(real), moments_of(fake)) == pytest.approx(exact, rel=FLOAT64 * 10)


def test_fid_of_a_set_and_itself_and_of_sets_without_spread() -> None:
    one = moments_of(vectors(50, 128, seed=1))
    assert 0 <= distance(one, one) < 1e-11
    still, moved = torch.zeros(5, 8), torch.ones(5, 8)
    assert distance(moments_of(still), moments_of(moved)) == 8


def check_moments_over_ranks(ranks: Ranks) -> None:
    features = vectors(90, 32, seed=3)
    whole, other = moments_of(features), moments_of(vectors(80, 32, seed=4))
    for first in (60, 90):  # the second rank may have none
        mine = moments_of(features[:first] if ranks.leads else features[first:])
        merged = mine.over_ranks()
        assert mine.count == (first if ranks.leads else 90 - first), "its own moments stay"
        assert merged.count == 90
        torch.testing.assert_close(merged.mean, whole.mean, rtol=FLOAT64, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=0, atol=FLOAT64)
        assert distance(merged, other) == pytest.approx(distance(whole, other), rel=1e-10)


def test_two_ranks_have_the_moments_of_one() -> None:
    run_ranks(check_moments_over_ranks, 2)


def test_without_ranks_the_moments_stay_what_they_are() -> None:
    alone = moments_of(vectors(20, 8, seed=1))
    merged = alone.over_ranks()
    assert merged.count == 20
    assert torch.equal(merged.total, alone.total)
    assert torch.equal(merged.outer, alone.outer)


# KID


def test_kid_is_torch_fidelitys_over_the_same_subsets() -> None:
    real, fake = vectors(300, 64, seed=1), vectors(250, 64, seed=2, shift=0.1)
    expected = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=20, kid_subset_size=100, verbose=False, rng_seed=2020
    )
    # Which side comes first changes the subsets that are drawn, not the meaning.
    mean, deviation = kid(fake, real, subsets=20, subset_size=100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=PRINTED)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=PRINTED)
    assert kid(fake, real, subsets=20, subset_size=100, seed=1)[0] != mean


def test_kid_is_the_mean_over_pairs_of_the_paper() -> None:
    """The definition, pair by pair, on subsets that are the whole sets."""
    real, fake = vectors(12, 5, seed=1).double(), vectors(12, 5, seed=2, shift=0.3).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 5 + 1) ** 3

    pairs = list(itertools.permutations(range(12), 2))
    within = sum(kernel(x[i], x[j]) for x in (real, fake) for i, j in pairs) / len(pairs)
    across = sum(kernel(x, y) for x in real for y in fake) / 144
    mean, deviation = kid(real, fake, subsets=3)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert deviation < 1e-12


def test_kid_has_no_bias_by_sample_size_and_tells_a_shift() -> None:
    alike = kid(vectors(2000, 16, seed=1)[:1000], vectors(2000, 16, seed=1)[1000:], subsets=50, subset_size=50)
    shifted = kid(vectors(1000, 16, seed=1), vectors(1000, 16, seed=1, shift=0.3), subsets=50, subset_size=50)
    assert abs(alike[0]) < 3 * alike[1] / 50**0.5
    assert shifted[0] > 10 * shifted[1] / 50**0.5


# Inception Score


def test_inception_score_is_torch_fidelitys() -> None:
    logits = torch.randn(203, 1008, generator=torch.Generator().manual_seed(1)) * 3  # in parts of 20 and 21
    expected = isc_features_to_metric(logits)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=PRINTED)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=PRINTED)


def test_inception_score_is_one_without_variety_and_the_number_of_classes_with_all() -> None:
    assert inception_score(torch.randn(1, 30).expand(50, 30)) == pytest.approx((1, 0), abs=FLOAT64)
    sure = torch.eye(4).repeat(25, 1) * 1000
    assert inception_score(sure, splits=1) == pytest.approx((4, 0), abs=FLOAT64)


# Precision, recall, density, coverage


def slow_manifold(real: Tensor, fake: Tensor) -> dict[str, float]:
    """The papers' definitions, image by image."""

    def radius(points: Tensor, i: int, k: int) -> float:
        others = [float(torch.dist(points[i], points[j])) for j in range(len(points)) if j != i]
        return sorted(others)[k - 1]

    def ball(points: Tensor, k: int) -> list[float]:
        return [radius(points, i, k) for i in range(len(points))]

    across = [[float(torch.dist(r, f)) for f in fake] for r in real]
    real_3, fake_3, real_5 = ball(real, 3), ball(fake, 3), ball(real, 5)
    n, m = len(real), len(fake)
    within = [[across[i][j] < real_5[i] for j in range(m)] for i in range(n)]
    return {
        "precision": sum(any(across[i][j] <= real_3[i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(across[i][j] <= fake_3[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(map(sum, within)) / (5 * m),
        "coverage": sum(map(any, within)) / n,
    }


def test_the_four_are_the_papers_definitions_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = vectors(60, 6, seed=1), vectors(45, 6, seed=2, shift=0.15)
    expected = slow_manifold(real.double(), fake.double())
    assert all(0.1 < value < 0.99 for value in expected.values()), expected
    monkeypatch.setattr(manifold, "_COLUMNS", 7)
    for block in (1, 200, 2**25):
        assert precision_recall_density_coverage(real, fake, block=block) == pytest.approx(expected, abs=FLOAT64)


def test_a_ball_has_its_border_for_precision_and_recall_only() -> None:
    """Counted by hand: real balls reach 10, 10 and 20 far, fake ones 30, 30 and 80."""
    real, fake = torch.tensor([[0.0], [10.0], [30.0]]), torch.tensor([[20.0], [-10.0], [100.0]])
    measured = precision_recall_density_coverage(real, fake, neighbours=1, density_neighbours=1)
    assert measured == pytest.approx({"precision": 2 / 3, "recall": 1, "density": 1 / 3, "coverage": 1 / 3})
    turned = precision_recall_density_coverage(fake, real, neighbours=1, density_neighbours=1)
    assert turned == pytest.approx({"precision": 1, "recall": 2 / 3, "density": 2, "coverage": 1})


def test_precision_and_recall_are_torch_fidelitys() -> None:
    real, fake = vectors(300, 12, seed=1), vectors(200, 12, seed=2, shift=0.1)
    expected = prc_features_to_metric(fake.double(), real.double(), verbose=False)
    ours = precision_recall_density_coverage(real, fake)
    assert 0.1 < expected["precision"] < 0.99
    assert ours["precision"] == pytest.approx(expected["precision"], abs=1e-6)  # theirs is a float32 mean
    assert ours["recall"] == pytest.approx(expected["recall"], abs=1e-6)


def test_the_four_tell_fidelity_from_diversity() -> None:
    real = vectors(200, 8, seed=1)
    assert precision_recall_density_coverage(real, real) == {
        "precision": 1,
        "recall": 1,
        "density": pytest.approx(1, abs=0.2),  # the fifth neighbour stands on the border, and rounding decides
        "coverage": 1,
    }
    far = precision_recall_density_coverage(real, real + 100)
    assert set(far.values()) == {0}
    one_mode = precision_recall_density_coverage(real, real[:1] + 0.01 * vectors(200, 8, seed=2))
    assert one_mode["precision"] == 1
    assert max(one_mode["recall"], one_mode["coverage"]) < 0.3


def test_no_more_distances_are_in_memory_than_a_block() -> None:
    a, b = vectors(50, 3, seed=1), vectors(40, 3, seed=2)
    blocks = [(rows, squared.clone()) for rows, squared in manifold._squared_distances(a, b, block=100)]
    assert max(squared.numel() for _, squared in blocks) <= 100
    whole = torch.cat([squared for _, squared in blocks])
    assert [i for rows, _ in blocks for i in range(rows.start, rows.stop)] == list(range(50))
    direct = (a.double()[:, None] - b.double()[None]).square().sum(2)
    torch.testing.assert_close(whole, direct, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (lambda few: kid(few[:1], few), "kid"),
        (lambda few: inception_score(few), "inception_score"),
        (lambda few: precision_recall_density_coverage(few, few), "coverage"),
    ],
)
def test_too_few_images_are_told_with_both_numbers(measure: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^eval\.num_images must be (at least|above) \d+ for .*{name}, got \d$"):
        measure(vectors(5, 4, seed=1))


# The network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file in the format of 2019 with random weights that keep an image's signal to the last layer, and its hash."""

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
            """Keep what the constructor has drawn."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Bare("random", ["2048"], feature_extractor_weights_path=empty)
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=random)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def pictures(count: int, seed: int, contrast: float = 1.0) -> Tensor:
    """(count, 48, 40, 3) uint8: portraits in changing light, with some noise."""
    random = np.random.RandomState(seed)
    scene = portrait(48, 40) * contrast
    found = [
        scene * random.uniform(0.4, 1.2, 3) + random.uniform(-40, 40) + random.normal(0, 12, scene.shape)
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(found).clip(0, 255).astype(np.uint8))


def write_pngs(folder: Path, images: Tensor) -> str:
    folder.mkdir()
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return str(folder)


def test_the_figures_of_two_folders_are_torch_fidelitys(
    weights: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pixels to figures: its program over PNG files against ours over the same pixels, with the same weights."""
    path, digest = weights
    real, fake = pictures(6, seed=1), pictures(7, seed=2, contrast=0.5)
    monkeypatch.setattr(inception, "_BATCH", 4)
    features = InceptionFeatures(path, CPU, sha256=digest)
    (real_features, _), (fake_features, logits) = features(real), features(fake)
    assert real_features.shape == (6, 2048)
    assert logits.shape == (7, 1008)
    assert real_features.dtype == logits.dtype == torch.float32
    assert real_features.std(0).mean() > 0.01 * real_features.mean(), "the features depend on the picture"

    theirs = calculate_metrics(
        input1=write_pngs(tmp_path / "fake", fake),
        input2=write_pngs(tmp_path / "real", real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
        isc=True,
        isc_splits=3,
        kid=True,
        kid_subsets=4,
        kid_subset_size=5,
        prc=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=4,
        save_cpu_ram=True,  # loads in this process
    )
    mean, deviation = inception_score(logits, splits=3)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=PRINTED)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=PRINTED)
    mean, deviation = kid(fake_features, real_features, subsets=4, subset_size=5)
    largest = (
        float((fake_features @ fake_features.T).max() / 2048 + 1) ** 3
    )  # of the kernel, which theirs has in float32
    rounding = torch.finfo(torch.float32).eps * largest
    assert mean > 1000 * rounding
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=rounding)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], abs=rounding)
    ours = precision_recall_density_coverage(real_features, fake_features)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    # Its eigenvalues of 2048 x 2048 would take ten seconds: a part of the numbers.
    part = slice(0, 2048, 16)
    fid = distance(moments_of(real_features[:, part]), moments_of(fake_features[:, part]))
    assert fid == pytest.approx(fidelity_fid(real_features[:, part], fake_features[:, part]), rel=1e-5)


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 wherever a GPU has it, as precision tf32 sets it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_features_are_in_full_float32_whatever_training_has_set(weights: tuple[Path, str]) -> None:
    path, digest = weights
    features = InceptionFeatures(path, CPU, sha256=digest)
    images = pictures(1, seed=3)
    expected = features(images)
    assert not any(p.requires_grad for p in features._network.parameters())

    seen = []
    features._network.register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    with torch.autocast("cpu", torch.bfloat16):
        again = features(images)
    assert seen == [(False, False)]
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad


def test_the_name_tells_the_weights(weights: tuple[Path, str]) -> None:
    path, digest = weights
    assert digest in InceptionFeatures(path, CPU, sha256=digest).name


class Harmful:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.write_text, (self.victim, "code of the file has run")


def test_another_file_is_refused_before_any_of_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, victim = tmp_path / "inception.pth", tmp_path / "victim"
    torch.save({"fc.weight": Harmful(victim)}, path)
    with pytest.raises(pickle.UnpicklingError):  # even where its hash is right
        InceptionFeatures(path, CPU, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(DataError) as caught:
        InceptionFeatures(path, CPU)
    told = str(caught.value)
    assert "\n" not in told
    assert all(part in told for part in (str(path), inception.SHA256, hashlib.sha256(path.read_bytes()).hexdigest()))
    assert not victim.exists()


def test_a_missing_file_is_told_with_where_it_comes_from_and_goes(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        InceptionFeatures(tmp_path / "none.pth", CPU)
    assert "\n" not in str(caught.value)
    assert inception.SOURCE in str(caught.value)
    assert str(tmp_path / "none.pth") in str(caught.value)
    with pytest.raises(DataError, match="Is a directory"):
        InceptionFeatures(tmp_path, CPU)


def test_torch_fidelity_is_needed_for_the_network_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert inception.__file__ is not None
    fresh = runpy.run_path(inception.__file__)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[metrics\]'"):
        fresh["InceptionFeatures"](tmp_path / "none.pth", CPU)
