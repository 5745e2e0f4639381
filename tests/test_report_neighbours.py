"""The photographs nearest to samples, and the pictures that a report makes of a run's generator."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import checkpoint as checkpoints
from pipeline import report_made
from pipeline.checkpoint_writer import mark_best
from pipeline.cli import train as command
from pipeline.cli.report import main
from pipeline.config import DataConfig
from pipeline.face_set import write_faces
from pipeline.report import write_report
from pipeline.report_made import refresh
from pipeline.report_neighbours import Photographs, look_up, nearest, open_photographs, small
from tests.commands import SETTINGS

NUM, SIDE = 12, 16


def pictures(count: int, height: int = 64, width: int = 64, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


class Held(Photographs):
    """Photographs that are at hand as an array."""

    def __init__(self, images: np.ndarray, **settings: bool) -> None:
        self.cfg = DataConfig(image_size=images.shape[1], **settings)
        self._kept = images

    def __len__(self) -> int:
        assert self._kept is not None
        return len(self._kept)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


@pytest.mark.parametrize(
    ("size", "side"), [((64, 64), 16), ((28, 28), 28), ((96, 64), 24), ((128, 128), 16), ((40, 48), 20), ((8, 8), 8)]
)
def test_pictures_are_made_small_by_averages_of_squares(size: tuple[int, int], side: int) -> None:
    images = pictures(2, *size, channels=4)
    found = small(images) + 127.5
    factor = size[0] // side
    for image, row in zip(images, found, strict=True):
        shrunk = Image.fromarray(image[..., :3]).reduce(factor)  # Pillow rounds, ours does not
        assert row.dtype == np.float32
        assert np.abs(row.reshape(side, -1, 3) - np.asarray(shrunk)).max() <= 0.5 + 1e-4


def test_the_nearest_are_those_of_a_plain_search_over_all() -> None:
    photographs = pictures(24, seed=1)
    queries = small(pictures(5, seed=2))
    blocks = np.split(photographs, [7, 8])
    found = nearest(queries, iter(blocks), 3)
    theirs = small(photographs)
    for i, query in enumerate(queries):
        distances = [rms(query, row) for row in theirs]
        order = np.argsort(distances)[:3]
        assert found.items[i].tolist() == order.tolist()
        assert found.distances[i] == pytest.approx([distances[k] for k in order], rel=1e-12)


def test_photographs_are_taken_in_any_order() -> None:
    photographs = pictures(10)
    for items in ([3, 7, 5], [9], [2, 3, 4], [5, 4]):
        assert (Held(photographs).take(np.array(items)) == photographs[items]).all()


def test_copies_are_found_and_photographs_do_not_find_themselves() -> None:
    photographs = pictures(40)
    found, yardstick = look_up(photographs[[3, 17]], Held(photographs))
    assert found.items[:, 0].tolist() == [3, 17]
    assert found.distances[:, 0].tolist() == [0, 0]
    theirs = small(photographs)
    expected = [min(rms(row, other) for k, other in enumerate(theirs) if k != i) for i, row in enumerate(theirs)]
    assert yardstick == pytest.approx(expected, rel=1e-12)
    twice, zero = look_up(photographs[:1], Held(np.concatenate([photographs, photographs[:1]])))
    assert twice.items[0, :2].tolist() == [0, 40], "a photograph that is there twice is shown twice"
    assert zero[0] == zero[-1] == 0


def test_a_mirrored_copy_is_found_where_training_mirrors() -> None:
    photographs = pictures(20)
    mirrored = photographs[5:6, :, ::-1]
    found, plain = look_up(mirrored, Held(photographs, flip=True))
    assert (found.items[0, 0], found.distances[0, 0]) == (5, 0)
    assert len(set(found.items[0].tolist())) == 3
    assert look_up(mirrored, Held(photographs))[0].distances[0, 0] > 10
    assert (plain > 0).all(), "a photograph is not its own neighbour by its mirror image either"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 24 images with checkpoints after 12 and 24, and the faces that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    write_faces(folder / "faces", NUM, workers=1)
    data = SETTINGS["data"] | {"dataroot": folder / "faces", "cache_dir": folder / "cache"}
    arguments = [f"--data.{key}={value}" for key, value in data.items()]
    arguments += ["--run.dir", str(folder / "run"), "--model.nz", "8", "--model.ngf", "4", "--model.ndf", "4"]
    arguments += ["--train.batch_size", "4", "--train.max_images", "24", "--train.num_epochs", "9"]
    arguments += ["--checkpoint.every_images", "12", "--distributed.threads", "1", "--data.workers", "1"]
    assert command.main(arguments) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def kept(run: Path, name: str) -> dict:
    return json.loads((run / "report" / f"{name}.json").read_text())


def test_the_end_of_training_leaves_samples_ways_and_neighbours(run: Path) -> None:
    for name, rows, columns in (("samples", 12, 12), ("walks", 5, 9), ("neighbours", 16, 4)):
        assert kept(run, name)["images_seen"] == 24
        with Image.open(run / "report" / f"{name}.png") as image:
            assert image.size == (columns * (SIDE + 2) - 2, rows * (SIDE + 2) - 2)
            assert len(image.getcolors(1 << 20)) > 100
    facts = kept(run, "neighbours")
    assert (facts["photographs"], facts["generated"], len(facts["shown"])) == (NUM, 256, 16)
    assert 0 < facts["sample_lowest"] <= facts["sample_median"]
    assert facts["photograph_median"] > 0
    firsts = [shown["distances"][0] for shown in facts["shown"]]
    assert firsts == sorted(firsts)
    assert firsts[0] == facts["sample_lowest"]
    assert all(len(set(shown["keys"])) == 3 for shown in facts["shown"])
    page = (run / "report.html").read_text()
    assert page.count("A sample and the photographs nearest to it") == 16
    assert page.count("Pictures on the way between two latents") == 5
    assert "144 random samples" in page
    assert "newest checkpoint, after 24 images" in page


def test_the_neighbours_in_the_picture_are_the_photographs_that_are_named(run: Path, trained: Path) -> None:
    cfg = checkpoints.open_generator(run)[1]
    photographs = open_photographs(cfg.data, 1)
    names = [photographs.dataset.key(i) for i in range(NUM)]
    with Image.open(run / "report" / "neighbours.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for row, about in enumerate(kept(run, "neighbours")["shown"][:4]):
        tiles = [pixels[row * 18 : row * 18 + 16, column * 18 : column * 18 + 16] for column in range(4)]
        for tile, key, distance in zip(tiles[1:], about["keys"], about["distances"], strict=True):
            assert (tile == photographs.take(np.array([names.index(key)]))[0]).all()
            both = small(np.stack([tiles[0], tile])), small(np.stack([tiles[0][:, ::-1], tile]))
            assert min(rms(*pair) for pair in both) == pytest.approx(distance)  # flip is set


def test_decoded_files_and_the_cache_give_the_same_photographs(run: Path, tmp_path: Path) -> None:
    cfg = checkpoints.open_generator(run)[1].data
    cached = open_photographs(cfg, 1)
    anew = open_photographs(dataclasses.replace(cfg, cache_dir=str(tmp_path / "other")), 2)
    assert (cached.decoded, anew.decoded) == (True, False)
    one, other = (np.concatenate(list(p.blocks())).astype(int) for p in (cached, anew))
    assert one.shape == (NUM, SIDE, SIDE, 3)  # without the margin of random crops
    assert np.abs(one - other).mean() < 0.25  # the decoders' own agreement


def test_what_is_made_is_kept_until_the_checkpoint_changes(run: Path, monkeypatch) -> None:
    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("made twice")

    with monkeypatch.context() as patch:
        patch.setattr(report_made, "generate", not_again)
        patch.setattr(report_made, "open_photographs", not_again)
        assert refresh(run) == {}
    before = (run / "report" / "samples.png").read_bytes()
    mark_best(run, run / "checkpoints" / "images-000000012")
    assert refresh(run) == {}
    for name in ("samples", "walks", "neighbours"):
        assert (kept(run, name)["images_seen"], kept(run, name)["best"]) == (12, True)
    assert (run / "report" / "samples.png").read_bytes() != before
    assert "best checkpoint, after 12 images" in write_report(run).read_text()
    shutil.rmtree(run / "checkpoints" / "images-000000012")
    assert refresh(run) == {}
    assert kept(run, "samples")["images_seen"] == 24, "the marked one is gone: the newest"
    (run / "report" / "walks.json").write_text("{")
    assert refresh(run) == {}
    assert kept(run, "walks")["images_seen"] == 24


def remade(run: Path) -> Path:
    shutil.rmtree(run / "report")
    return run


def test_photographs_that_are_not_at_hand_leave_a_sentence(run: Path, trained: Path, tmp_path: Path, capfd) -> None:
    away = tmp_path / "moved"
    (trained / "faces").rename(away)
    try:
        assert main([str(remade(run))]) == 0
        page = (run / "report.html").read_text()
        assert f"Not made: data.dataroot {trained / 'faces'}" in page or f"Not made: {trained / 'faces'}" in page
        assert page.count("Not made") == 1, "samples and ways need no photographs"
        assert main([str(run), "--data", str(away)]) == 0
        assert "A sample and the photographs nearest to it" in (run / "report.html").read_text()
    finally:
        away.rename(trained / "faces")
    write_faces(tmp_path / "others", 6, seed=5, workers=1)
    assert main([str(remade(run)), "--data", str(tmp_path / "others")]) == 0
    assert "others holds other photographs than those that the run was trained on" in (run / "report.html").read_text()
    assert capfd.readouterr().err == ""


def test_the_end_of_training_does_not_wait_for_many_photographs(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(report_made, "AT_END_KEPT", NUM - 1)
    assert refresh(remade(run), at_end=True).keys() == {"neighbours"}
    assert "takes a while" in write_report(run).read_text()
    assert refresh(run) == {}
    assert "A sample and the photographs nearest to it" in write_report(run).read_text()


def test_an_older_picture_is_shown_with_the_reason(run: Path, monkeypatch) -> None:
    mark_best(run, run / "checkpoints" / "images-000000012")
    monkeypatch.setattr(report_made, "AT_END_KEPT", NUM - 1)
    page = write_report(run).read_text()
    assert "newest checkpoint then, after 24 images. An older picture; none newer was made: looking through" in page


def test_a_disk_that_refuses_the_pictures_leaves_the_report(run: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    reasons = refresh(remade(run))
    assert reasons.keys() == {"samples", "walks", "neighbours"}
    assert "No space left on device" in reasons["samples"]
    assert list((run / "report").iterdir()) == []


def test_a_damaged_checkpoint_leaves_a_sentence(run: Path) -> None:
    for folder in checkpoints.folders(run):
        (folder / "state.pt").write_bytes(b"")
    page = write_report(remade(run)).read_text()
    assert page.count("holds no checkpoint that can be read") == 3
