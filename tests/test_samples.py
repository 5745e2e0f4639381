"""Files that go bad after they were indexed: replaced by one rule, whoever decodes, and named."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import augment
from pipeline.augment import Parameters
from pipeline.config import DataConfig
from pipeline.decode import Decoder, dali_problem, window_shape
from pipeline.decode.pillow import PillowDecoder
from pipeline.errors import DataError
from pipeline.feed import batches, open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.order import Order, Slice
from pipeline.samples import Samples, check_share
from tests.images import jpeg_bytes, png_chunk, portrait

CPU = torch.device("cpu")
COUNT, BATCH, SEED = 24, 6, 5
SETTINGS: dict[str, Any] = {"image_size": 16, "crop_margin": 3, "flip": True, "contrast": 0.3}
needs_dali = pytest.mark.skipif(bool(dali_problem()), reason=f"DALI cannot be imported: {dali_problem()}")
DECODERS = ["pillow", pytest.param("dali", marks=needs_dali)]
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda")]

REASONS = {
    "00.jpg": r"cannot be decoded \(.+\)",
    "03.png": r"cannot be read \(No such file or directory\)",
    "04.jpg": r"has other content than when it was indexed",
    "05.jpg": r"has 200 bytes, and had \d+ when it was indexed",
    "10.jpg": r"has 0 bytes, and had \d+ when it was indexed",
    "12.jpg": r"has \d+ bytes, and had \d+ when it was indexed",
    "15.png": r"cannot be decoded \(.+\)",
    "17.jpg": r"cannot be decoded \(.+\)",
    "18.jpg": r"cannot be decoded \(.+\)",
    "23.png": r"cannot be read \(No such file or directory\)",
}
IN_PLACE_OF = {0: 1, 3: 6, 4: 6, 5: 6, 10: 11, 12: 13, 15: 16, 17: 19, 18: 19, 23: 1}


def undecodable_jpeg(jpeg: bytes) -> bytes:
    """Header and end marker stay, and the picture names a quantisation table that is not there."""
    data = bytearray(jpeg)
    data[data.index(b"\xff\xc0") + 12] = 9
    return bytes(data)


def png_of(height: int, width: int, content: bytes) -> bytes:
    """A PNG of 8-bit RGBA with any content, all its checksums right."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", content), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def scene(number: int) -> Image.Image:
    return Image.fromarray(portrait(24 + number % 5, 22 + number % 7) ^ np.uint8(9 * number))


def photographs() -> dict[str, bytes]:
    """COUNT good files, each of another scene; every fourth is a PNG with alpha."""
    files = {}
    for number in range(COUNT):
        if number % 4 == 3:
            picture, buffer = scene(number), io.BytesIO()
            picture.putalpha(40 + number)
            picture.save(buffer, "PNG")
            files[f"{number:02}.png"] = buffer.getvalue()
        else:
            files[f"{number:02}.jpg"] = jpeg_bytes(scene(number))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def indexed(folder: Path) -> Dataset:
    return open_dataset(DataConfig(dataroot=str(folder), cache_dir=str(folder.parent / "cache")))


def spoil(folder: Path, good: dict[str, bytes]) -> None:
    """What happens to files after they were indexed."""
    for name in ("03.png", "23.png"):
        (folder / name).unlink()
    changed = bytearray(good["04.jpg"])
    changed[-20] ^= 1
    (folder / "04.jpg").write_bytes(changed)
    os.truncate(folder / "05.jpg", 200)
    os.truncate(folder / "10.jpg", 0)
    (folder / "12.jpg").write_bytes(good["13.jpg"])


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return indexed(write(tmp_path_factory.mktemp("clean") / "images", photographs()))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Some files do not decode, as their headers do not show; others change once they are indexed."""
    good = photographs()
    undecodable = {name: undecodable_jpeg(good[name]) for name in ("00.jpg", "17.jpg", "18.jpg")}
    undecodable["15.png"] = png_of(*np.asarray(scene(15)).shape[:2], np.random.default_rng(0).bytes(3000))
    folder = write(tmp_path_factory.mktemp("spoilt") / "images", good | undecodable)
    dataset = indexed(folder)
    assert len(dataset) == COUNT
    spoil(folder, good)
    return dataset


def take(
    samples: Samples, decoder: Decoder, count: int, shard: Slice | None = None, images_seen: int = 0, **settings: Any
) -> list[Tensor]:
    device, threads = settings.pop("device", CPU), settings.pop("threads", 2)
    feed = open_feed(
        DataConfig(**(SETTINGS | settings)),
        samples.dataset,
        seed=SEED,
        shard=shard or Slice(BATCH),
        device=device,
        images_seen=images_seen,
        threads=threads,
        decoder=decoder,
        cached=None,
        samples=samples,
    )
    with closing(feed):
        return [feed.next().cpu() for _ in range(count)]


def expected(clean: Dataset, decoder: Decoder, count: int, device: torch.device, **settings: Any) -> list[Tensor]:
    """The batches of the good files, told by hand which to take."""
    cfg = DataConfig(**(SETTINGS | settings))
    wanted = itertools.islice(batches(cfg, Order(SEED, COUNT), Slice(BATCH), 0), count)
    chosen = [(np.array([IN_PLACE_OF.get(i, i) for i in b.items.tolist()]), b.parameters) for b in wanted]
    if decoder == "pillow":
        with closing(PillowDecoder(clean, window_shape(cfg)[:2], cfg.nc, 1)) as pillow:
            windows = pillow.windows(items for items, _ in chosen)
            pairs = zip(windows, (params for _, params in chosen), strict=True)
            return [torch.from_numpy(augment.apply_numpy(images, params, cfg.size)) for images, params in pairs]
    from pipeline.decode.dali import DaliDecoder

    with closing(DaliDecoder(cfg, clean, device=device, threads=1, max_batch=BATCH)) as dali:
        return [torch.from_dlpack(output).cpu() for output in dali.images(chosen)]


def check_named(samples: Samples) -> None:
    assert samples.num_replaced == len(samples.replaced) == len(REASONS)
    for key, reason in samples.replaced:
        assert re.fullmatch(REASONS[key], reason), (key, reason)
    assert {key for key, _ in samples.replaced} == set(REASONS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nc", [1, 3, 4])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_bad_file_is_replaced_by_the_next_good_one_and_named_once(
    clean: Dataset, spoilt: Dataset, decoder: Decoder, nc: int, device: torch.device
) -> None:
    samples = Samples(spoilt)
    found = take(samples, decoder, 8, nc=nc, device=device)
    for batch, other in zip(found, expected(clean, decoder, 8, device, nc=nc), strict=True):
        assert torch.equal(batch, other)
    check_named(samples)


@pytest.mark.parametrize("decoder", DECODERS)
def test_ranks_threads_prefetch_and_resuming_replace_alike(spoilt: Dataset, decoder: Decoder) -> None:
    one = take(Samples(spoilt), decoder, 8)
    others = take(Samples(spoilt), decoder, 8, threads=5, prefetch=7)
    assert torch.equal(torch.cat(one), torch.cat(others))
    resumed = take(Samples(spoilt), decoder, 3, images_seen=5 * BATCH, threads=1, prefetch=1)
    assert torch.equal(torch.cat(one[5:]), torch.cat(resumed))
    ranks = [torch.stack(take(Samples(spoilt), decoder, 8, Slice(BATCH, rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, dim=1), torch.stack(one))


@needs_dali
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_a_failing_dali_pipeline_loses_doubles_and_reorders_no_batch(
    clean: Dataset, spoilt: Dataset, prefetch: int
) -> None:
    from pipeline.decode.dali import DaliDecoder

    def images(source: Samples | Dataset, items: np.ndarray) -> list[Tensor]:
        cfg = DataConfig(image_size=16, prefetch=prefetch)
        nothing = Parameters(None, None, None, None)
        dali = DaliDecoder(cfg, source, device=CPU, threads=2, max_batch=5, augmented=False)
        with closing(dali):  # 24 images in batches of 5: the last one is smaller
            parts = np.split(items, range(5, COUNT, 5))
            return [torch.from_dlpack(output) for output in dali.images((part, nothing) for part in parts)]

    items = np.arange(COUNT)
    chosen = np.array([IN_PLACE_OF.get(i, i) for i in range(COUNT)])
    samples = Samples(spoilt)
    found, right = images(samples, items), images(clean, chosen)
    assert [len(batch) for batch in found] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat(found), torch.cat(right))
    check_named(samples)


@needs_dali
@pytest.mark.parametrize("prefetch", [1, 3])
def test_what_only_dali_cannot_decode_is_found_too(tmp_path: Path, prefetch: int) -> None:
    """Pillow paints the missing rows of a PNG black, libpng gives up."""
    files = {name: data for name, data in photographs().items() if name.endswith(".png")}
    height, width = np.asarray(scene(11)).shape[:2]
    files["11.png"] = png_of(height, width, zlib.compress(bytes((4 * width + 1) * (height // 2))))
    samples = Samples(indexed(write(tmp_path / "images", files)))
    take(samples, "dali", 2, prefetch=prefetch)
    assert samples.replaced == [("11.png", "cannot be decoded by DALI (Failed to decode sample #0)")]
    others = Samples(samples.dataset)
    take(others, "pillow", 2)
    assert others.num_replaced == 0


@needs_dali
def test_an_error_of_dali_that_no_file_has_caused_is_not_blamed_on_one(
    clean: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.decode.dali import DaliDecoder

    class Broken:
        def run(self) -> None:
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nout of memory : \nno longer valid")

    def images(dali: DaliDecoder) -> list[Any]:
        nothing = Parameters(None, None, None, None)
        return list(dali.images([(np.arange(3), nothing)]))

    samples = Samples(clean)
    shape: dict[str, Any] = {"device": CPU, "threads": 1, "max_batch": 3, "augmented": False}
    with closing(DaliDecoder(DataConfig(image_size=16), samples, **shape)) as dali:
        dali._pipeline = Broken()
        dali._in_flight.append((np.arange(3), Parameters(None, None, None, None)))
        with pytest.raises(DataError, match=r"each by itself \(out of memory\)"):
            images(dali)
    with closing(DaliDecoder(DataConfig(image_size=16), samples, **shape)) as dali:
        dali._pipeline = Broken()
        dali._in_flight.append((np.arange(3), Parameters(None, None, None, None)))
        monkeypatch.setattr(dali, "_build", lambda *_, **__: Broken())
        with pytest.raises(RuntimeError, match="out of memory"):
            images(dali)
    assert samples.num_replaced == 0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("undecodable", [True, False])
def test_when_every_file_is_bad_that_is_said_with_the_first_reason(
    tmp_path: Path, decoder: Decoder, undecodable: bool
) -> None:
    files = {name: data for name, data in photographs().items() if name.endswith(".jpg")}
    if undecodable:
        files = {name: undecodable_jpeg(data) for name, data in files.items()}
    folder = write(tmp_path / "images", files)
    samples = Samples(indexed(folder))
    for name in () if undecodable else files:
        (folder / name).unlink()
    reason = "cannot be decoded" if undecodable else r"cannot be read \(No such file"
    with pytest.raises(DataError, match=rf"none of the 18 images can be used any more; \d\d\.jpg {reason}"):
        take(samples, decoder, 1)
    assert samples.num_replaced == len(files)


def test_many_threads_find_a_bad_file_once(spoilt: Dataset) -> None:
    samples = Samples(spoilt)
    with ThreadPoolExecutor(8) as pool:
        taken = [sample.item for sample in pool.map(samples.read, [3, 4, 5, 6] * 100)]
    assert taken == [6] * 400
    assert sorted(key for key, _ in samples.replaced) == ["03.png", "04.jpg", "05.jpg"]
    assert samples.num_bad == 3


def test_a_file_once_bad_stays_so_and_a_noted_one_is_only_named(clean: Dataset) -> None:
    samples = Samples(clean)
    samples.reject(2, "cannot be decoded (by anyone)")
    samples.reject(2, "for another reason")
    samples.note("07.png", "was gone")
    assert (samples.read(1).item, samples.read(2).item, samples.read(7).item) == (1, 3, 7)
    assert samples.replaced == [("02.jpg", "cannot be decoded (by anyone)"), ("07.png", "was gone")]
    assert (samples.num_replaced, samples.num_bad) == (2, 1)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_of_an_archive_cut_while_it_is_read_what_is_left_goes_on(tmp_path: Path, kind: str) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "set"), kind, write(tmp_path / "images", photographs())))
    samples = Samples(indexed(path))
    whole = path.stat().st_size
    os.truncate(path, 16_384)
    take(samples, "pillow", 4)
    assert 0 < samples.num_replaced < COUNT
    for key, reason in samples.replaced:
        cut = f"cannot be read ({path}: has 16384 bytes, and had {whole} when it was opened)"
        assert reason in (cut, "reaches beyond the tar's present end"), key


def test_how_many_may_prove_bad_is_a_share_and_none_when_strict() -> None:
    assert DataConfig().bad_allowed(1_000) == 10
    assert DataConfig(max_bad_fraction=0.29).bad_allowed(100) == 29
    assert DataConfig(max_bad_fraction=0.1).bad_allowed(9) == 0
    assert DataConfig(max_bad_fraction=1.0, strict=True).bad_allowed(100) == 0
    replaced = [("a.jpg", "is gone"), ("b.jpg", "is gone")]
    check_share(DataConfig(max_bad_fraction=0.02), replaced, 100)
    with pytest.raises(DataError, match=r"^2 of 100 images .*\(data.max_bad_fraction is 0.01\): a.jpg is gone$"):
        check_share(DataConfig(), replaced, 100)
    with pytest.raises(DataError, match=r"data\.strict is set"):
        check_share(DataConfig(strict=True), replaced, 10_000)
