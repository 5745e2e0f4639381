import errno
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.cache
from pipeline.cache import Cached, build_cache, cache_kind
from pipeline.config import DataConfig
from pipeline.decode import dali_problem, window_shape
from pipeline.decode.pillow import PillowDecoder
from pipeline.errors import DataError, StorageError, UserError
from pipeline.index import Dataset, open_dataset
from pipeline.samples import Samples
from tests.images import jpeg_bytes, portrait

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(bool(dali_problem()), reason=f"DALI cannot be imported: {dali_problem()}")
COUNT = 300  # more than two batches of the builder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        scene = portrait(24 + number % 7, 24 + number % 5) ^ np.uint8(number % 64)
        (folder / f"{number:03}.jpg").write_bytes(jpeg_bytes(Image.fromarray(scene)))
    return folder


@pytest.fixture
def cfg(folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(dataroot=str(folder), cache_dir=str(tmp_path), image_size=16, crop_margin=2, decoder="pillow")


@pytest.fixture
def dataset(cfg: DataConfig) -> Dataset:
    return open_dataset(cfg)


def build(cfg: DataConfig, dataset: Dataset, **options: Any) -> Cached:
    defaults: dict[str, Any] = {"decoder": "pillow", "kind": "host", "device": CPU, "threads": 2}
    return build_cache(cfg, dataset, **(defaults | options))


def windows(cfg: DataConfig, dataset: Dataset) -> np.ndarray:
    decoder = PillowDecoder(dataset, window_shape(cfg)[:2], cfg.nc, 2)
    (images,) = decoder.windows([np.arange(len(dataset))])
    decoder.close()
    return images


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shares that were decoded, as (start, stop)."""
    shares = []
    fill = pipeline.cache._fill

    def counting(out: Any, start: int, stop: int, *rest: Any) -> None:
        shares.append((start, stop))
        fill(out, start, stop, *rest)

    monkeypatch.setattr(pipeline.cache, "_fill", counting)
    return shares


class Meeting:
    """What pipeline.distributed.together does, for ranks that are threads."""

    def __init__(self, world_size: int) -> None:
        self.count = 0
        self._barrier = threading.Barrier(world_size, action=self._met)
        self._errors: dict[int, UserError] = {}

    def _met(self) -> None:
        self.count += 1

    def options(self, rank: int) -> dict[str, Any]:
        def together(action: Callable[[], Any]) -> Any:
            try:
                action()
            except UserError as error:
                self._errors[rank] = error
            self._barrier.wait(30)
            for first in self._errors.values():
                raise first

        return {"local_rank": rank, "local_world_size": self._barrier.parties, "threads": 1, "together": together}


def damage_images(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, i: read(self, i)[: 300 if i in numbers else None])


def test_it_holds_the_windows_of_all_images_in_order(cfg: DataConfig, dataset: Dataset) -> None:
    told: list[tuple[int, int]] = []
    cached = build(cfg, dataset, progress=lambda done, total: told.append((done, total)))
    assert cached.images.shape == (COUNT, 18, 18, 3)
    np.testing.assert_array_equal(cached.images, windows(cfg, dataset))
    assert told == [(128, COUNT), (256, COUNT), (COUNT, COUNT)]
    assert cached.path.name == f"decoded-{dataset.index.fingerprint[:16]}-18x18x3-pillow.u8"
    assert not list(cached.path.parent.glob("*.partial"))


def test_a_later_run_takes_what_is_there(cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]]) -> None:
    first = np.array(build(cfg, dataset).images)
    again = build(cfg, dataset)
    assert built == [(0, COUNT)]
    np.testing.assert_array_equal(again.images, first)
    with pytest.raises(ValueError, match="read-only"):
        again.images[0] = 0


def test_another_geometry_makes_another_file(cfg: DataConfig, dataset: Dataset) -> None:
    other = DataConfig(dataroot=cfg.dataroot, cache_dir=cfg.cache_dir, image_size=[16, 32], nc=1)
    assert build(cfg, dataset).path != build(other, dataset).path


def test_ranks_share_the_work_and_map_one_file(cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]]) -> None:
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # the second time nothing is to do
            meeting = Meeting(3)
            cached = [
                run.result(timeout=60)
                for run in [pool.submit(build, cfg, dataset, **meeting.options(r)) for r in range(3)]
            ]
            assert meeting.count == 3
    assert sorted(built) == [(0, 100), (100, 200), (200, 300)]
    for each in cached:
        np.testing.assert_array_equal(each.images, windows(cfg, dataset))


def nothing_is_left(cfg: DataConfig) -> bool:
    return not [path for path in Path(cfg.cache_dir).glob("decoded-*") if path.suffix != ".lock"]


def test_when_one_rank_fails_all_name_its_file_and_nothing_is_left(
    cfg: DataConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_images([222], monkeypatch)
    cfg = replace(cfg, strict=True)
    meeting = Meeting(3)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(build, cfg, dataset, **meeting.options(rank)) for rank in range(3)]
        for run in runs:
            with pytest.raises(DataError, match=r"data\.strict is set.*222\.jpg has 300 bytes"):
                run.result(timeout=60)
    assert nothing_is_left(cfg)


def test_of_two_runs_at_once_the_second_waits_and_takes_the_first_ones(
    cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(build, cfg, dataset) for _ in range(2)]
        first, second = (run.result(timeout=60) for run in runs)
    assert built == [(0, COUNT)]
    np.testing.assert_array_equal(first.images, second.images)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_json(path: Path) -> None:
    file = path.with_suffix(".json")
    file.write_text(file.read_text()[:40])


def another_json(path: Path) -> None:
    path.with_suffix(".json").write_text("[1]")


def an_older_format(path: Path) -> None:
    file = path.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))


def garble_the_replaced(path: Path) -> None:
    file = path.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"replaced": [["a.jpg", 5]]}))


def lose_the_file(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [shorten, flip_a_bit, cut_the_json, another_json, an_older_format, garble_the_replaced, lose_the_file],
)
def test_what_is_damaged_is_built_again(
    cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]], damage: Any
) -> None:
    expected = windows(cfg, dataset)
    damage(build(cfg, dataset).path)
    np.testing.assert_array_equal(build(cfg, dataset).images, expected)
    assert len(built) == 2


def test_the_rest_of_a_killed_run_is_overwritten(cfg: DataConfig, dataset: Dataset) -> None:
    path = build(cfg, dataset).path
    path.with_suffix(".json").unlink()
    partial = path.with_name(f"{path.name}.{pipeline.cache.machine()}.partial")
    path.rename(partial)
    os.truncate(partial, 1000)
    np.testing.assert_array_equal(build(cfg, dataset).images, windows(cfg, dataset))
    assert not partial.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    cfg: DataConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(Path(cfg.cache_dir).rglob("*"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"decoded images take .* free .*No space left.*data\.cache_dir"):
        build(cfg, dataset)
    left = set(Path(cfg.cache_dir).rglob("*")) - set(before)
    assert all(path.suffix == ".lock" for path in left)


BAD = [(number, f"{number:03}.jpg") for number in (99, 100, 222, 299)]
"""On both sides of the border between the shares of ranks 0 and 1, in the middle of one, and the last."""


@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_rows_of_bad_files_show_the_next_image_and_each_later_run_names_them_again(
    cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    expected = np.array(build(cfg, dataset, decoder=decoder).images)
    expected[[99, 100, 222, 299]] = expected[[101, 101, 223, 0]]
    another = replace(cfg, cache_dir=cfg.cache_dir + "/another", max_bad_fraction=0.02)
    damage_images([number for number, _ in BAD], monkeypatch)
    met = []
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # the second time nothing is decoded
            meeting, samples = Meeting(3), [Samples(dataset) for _ in range(3)]
            runs = [
                pool.submit(build, another, dataset, decoder=decoder, samples=samples[r], **meeting.options(r))
                for r in range(3)
            ]
            for run in runs:
                np.testing.assert_array_equal(run.result(timeout=60).images, expected)
            met.append([[key for key, _ in each.replaced] for each in samples])
            reasons = {key: reason for each in samples for key, reason in each.replaced}
            assert sorted(reasons) == [key for _, key in BAD]
            assert all(re.fullmatch(r"has 300 bytes, and had \d+ when it was indexed", r) for r in reasons.values())
    assert len(built) == 4
    # Looking for what to put in place of 099 the first rank meets 100, which is the second one's; Pillow's threads
    # find the bad ones of a batch in any order.
    assert [sorted(keys) for keys in met[0]] == [["099.jpg", "100.jpg"], ["100.jpg"], ["222.jpg", "299.jpg"]]
    assert sorted(met[1][0]) == [key for _, key in BAD]
    assert met[1][1:] == [[], []]


def test_a_kept_file_with_more_replaced_than_allowed_is_built_again(
    cfg: DataConfig, dataset: Dataset, built: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(cfg, strict=True)
    with monkeypatch.context() as patch:
        damage_images([222], patch)
        samples = Samples(dataset)
        images = np.array(build(cfg, dataset, samples=samples).images)
        np.testing.assert_array_equal(images[222], images[223])
        assert samples.num_replaced == 1
        with pytest.raises(DataError, match=r"222\.jpg has 300 bytes"):
            build(strict, dataset)
        assert nothing_is_left(cfg)
        build(cfg, dataset)
    samples = Samples(dataset)
    np.testing.assert_array_equal(build(strict, dataset, samples=samples).images, windows(cfg, dataset))
    assert samples.num_replaced == 0
    assert len(built) == 4


def test_when_too_many_prove_bad_no_more_is_decoded_and_nothing_is_left(
    cfg: DataConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_images(list(range(50, COUNT)), monkeypatch)
    told: list[int] = []
    with pytest.raises(DataError, match=r"\d+ of 300 images .*data\.max_bad_fraction is 0\.01.*\.jpg has 300 bytes"):
        build(cfg, dataset, progress=lambda done, _: told.append(done))
    assert told == []
    assert nothing_is_left(cfg)


def test_a_device_cache_is_a_tensor(cfg: DataConfig, dataset: Dataset) -> None:
    cached = build(cfg, dataset, kind="device")
    assert isinstance(cached.images, torch.Tensor)
    np.testing.assert_array_equal(cached.images.numpy(), windows(cfg, dataset))


@needs_dali
def test_dali_fills_it_with_the_same_pictures(cfg: DataConfig, dataset: Dataset) -> None:
    cached = build(cfg, dataset, decoder="dali")
    difference = np.abs(np.asarray(cached.images).astype(int) - windows(cfg, dataset))
    assert difference.mean() < 0.25  # the tolerance of tests/test_decode.py
    assert cached.path.name.endswith("-dali.u8")


def test_auto_chooses_by_what_is_free(cfg: DataConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(disk: float, memory: float) -> tuple[str, str]:
        monkeypatch.setattr(pipeline.cache, "_free_disk", lambda _: int(disk * 2**30))
        monkeypatch.setattr(pipeline.cache, "_available_memory", lambda: int(memory * 2**30))
        return cache_kind(cfg, dataset, CPU, decoder="pillow")

    chosen, reason = kind(10, 8)
    assert chosen == "host"
    assert reason.startswith("300 decoded images take 0.3 MiB; 10.0 GiB are free in ")
    assert kind(0.5, 8)[0] == "none"
    assert kind(10, 0.0002)[0] == "none"


def test_what_is_asked_for_is_taken(cfg: DataConfig, dataset: Dataset) -> None:
    for wanted in ("none", "host", "device"):
        asked = DataConfig(dataroot=cfg.dataroot, cache_dir=cfg.cache_dir, image_size=16, cache=wanted)
        assert cache_kind(asked, dataset, CPU, decoder="pillow") == (wanted, f"data.cache is {wanted}.")
