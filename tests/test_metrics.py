"""The real side that is kept, and an evaluation on one rank and on two."""

from __future__ import annotations

import dataclasses
import math
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
from pipeline.metrics import real_side, through_inception
from pipeline.metrics.evaluation import Evaluation, weights_path
from pipeline.metrics.gathering import gathered, shares
from pipeline.metrics.inception import SHA256
from pipeline.metrics.real_side import RealSide
from pipeline.models import Generator
from pipeline.sampling import recalibrated
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
PHOTOGRAPHS = 24


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
