"""The index: what is accepted, what is left out and why, and when a kept one holds."""

from __future__ import annotations

import io
import logging
import os
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config import DataConfig
from pipeline.errors import DataError, StorageError
from pipeline.headers import BadImage, read_size
from pipeline.index import Dataset, build_index, cache_folder, check_full, index_file, leave_out, open_dataset
from pipeline.sources import FolderSource, open_source
from tests.images import HEIGHT, WIDTH, bad_images, exif, jpeg_bytes, odd_images, png_chunk, portrait, with_thumbnail

REASONS = {
    "truncated_jpeg": "cut short",
    "truncated_large_jpeg": "cut short",
    "truncated_thumbnail_jpeg": "cut short",
    "header_only_jpeg": "no picture",
    "truncated_png": "cut short",
    "text": "neither JPEG nor PNG",
    "empty": "is empty",
    "forged_jpeg": "30000 x 30000 pixels",
    "forged_png": "30000 x 30000 pixels",
    "hollow_png": "too little PNG content for 7000 x 7000 pixels",
    "zero_pixels_jpeg": "no pixels",
    "zero_pixels_png": "no pixels",
}


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    return DataConfig(dataroot=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by every file read from a folder."""
    read: list[int] = []
    real = FolderSource.read

    def counted(self: FolderSource, item: int) -> np.ndarray:
        read.append(item)
        return real(self, item)

    monkeypatch.setattr(FolderSource, "read", counted)
    return read


def test_good_images_are_accepted_with_the_size_a_viewer_sees(cfg: DataConfig) -> None:
    images = odd_images(Path(cfg.dataroot))
    dataset = open_dataset(cfg)
    assert dataset.index.rejected == ()
    assert [dataset.key(i) for i in range(len(dataset))] == sorted(path.name for path in images.values())
    for i in range(len(dataset)):
        assert dataset.size(i) == (HEIGHT, WIDTH)
        assert dataset.index.crcs[i] == zlib.crc32(dataset.read(i))
        with Image.open(io.BytesIO(dataset.read(i))) as image:
            assert ImageOps.exif_transpose(image).size == (WIDTH, HEIGHT)


def test_bad_images_are_left_out_and_named_with_their_reason(cfg: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    good = odd_images(Path(cfg.dataroot))
    bad = bad_images(Path(cfg.dataroot))
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(cfg)
    assert len(dataset) == len(good)
    reasons = dict(dataset.index.rejected)
    for name, path in bad.items():
        assert REASONS[name] in reasons[path.name], name
    (line,) = caplog.messages
    assert f"{len(bad)} of {len(good) + len(bad)} files are left out: empty.jpg is empty, forged.jpg" in line
    assert "\n" not in line
    names = index_file(cfg).with_name("rejected.txt").read_text().splitlines()
    assert [name.split("\t")[0] for name in names] == sorted(path.name for path in bad.values())


def test_a_forged_header_is_refused_without_memory_for_its_pixels(cfg: DataConfig) -> None:
    bad = bad_images(Path(cfg.dataroot))
    tracemalloc.start()
    try:
        for name in ("forged_jpeg", "forged_png"):
            with pytest.raises(BadImage, match=r"30000 x 30000 pixels by its header, more than data\.max_pixels"):
                read_size(bad[name].read_bytes(), cfg.max_pixels)
        with pytest.raises(DataError, match="none of its"):
            open_dataset(cfg)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_file_too_large_is_left_out_unread(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_images(Path(cfg.dataroot))
    with (Path(cfg.dataroot) / "huge.jpg").open("wb") as file:
        file.truncate(5 << 30)  # sparse: takes no disk
    read = reads(monkeypatch)
    dataset = open_dataset(cfg)
    assert dataset.index.rejected == (("huge.jpg", f"has {5 << 30} bytes, more than {64 << 20}"),)
    assert len(read) == len(dataset)


def test_strict_names_the_first_bad_file(cfg: DataConfig) -> None:
    odd_images(Path(cfg.dataroot))
    bad_images(Path(cfg.dataroot))
    for _ in range(2):  # from a pass, then from the kept index
        with pytest.raises(DataError, match=r"set: empty\.jpg is empty \(data\.strict is set\)"):
            open_dataset(replace(cfg, strict=True))


def test_a_kept_index_is_reused_until_a_file_changes(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    images = odd_images(Path(cfg.dataroot))
    bad_images(Path(cfg.dataroot))
    read = reads(monkeypatch)
    first = open_dataset(cfg)
    assert len(read) == len(first) + len(first.index.rejected)
    read.clear()
    second = open_dataset(cfg)
    assert not read
    assert second.index.rejected == first.index.rejected
    assert second.fingerprint == first.fingerprint
    for name in ("items", "heights", "widths", "crcs"):
        before, after = getattr(first.index, name), getattr(second.index, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)

    status = images["rgb"].stat()
    images["rgb"].write_bytes(images["rgb"].read_bytes()[:-1] + b"\xd8")  # the same size, now without an end marker
    os.utime(images["rgb"], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    third = open_dataset(cfg)
    assert read
    assert len(third) == len(first) - 1
    assert third.fingerprint != first.fingerprint


def test_another_pixel_limit_makes_a_new_pass(cfg: DataConfig) -> None:
    odd_images(Path(cfg.dataroot))
    (Path(cfg.dataroot) / "large.jpg").write_bytes(jpeg_bytes(Image.fromarray(portrait(200, 100))))
    ((key, reason),) = open_dataset(replace(cfg, max_pixels=19_999)).index.rejected
    assert key == "large.jpg"
    assert "more than data.max_pixels = 19999" in reason
    assert not open_dataset(cfg).index.rejected


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "bit"])
def test_a_damaged_index_is_made_anew(cfg: DataConfig, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    odd_images(Path(cfg.dataroot))
    first = open_dataset(cfg)
    kept = index_file(cfg)
    data = bytearray(kept.read_bytes())
    if damage == "bit":
        data[data.index(b"items.npy") + 180] ^= 1
    kept.write_bytes({"cut": data[:500], "text": b"nonsense", "empty": b"", "bit": data}[damage])
    with caplog.at_level(logging.WARNING):
        second = open_dataset(cfg)
    assert "the kept index is damaged" in caplog.text
    assert second.fingerprint == first.fingerprint
    caplog.clear()
    open_dataset(cfg)
    assert not caplog.messages
    assert not list(kept.parent.glob("*.partial"))


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(cfg: DataConfig, tmp_path: Path) -> None:
    images = odd_images(Path(cfg.dataroot))
    prints = {open_dataset(cfg).fingerprint}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            for image in reversed(images.values()):
                archive.write(image, image.name)
        prints.add(open_dataset(replace(cfg, dataroot=str(path))).fingerprint)
    assert len(prints) == 1
    images["rgb"].rename(images["rgb"].with_name("renamed.jpg"))
    prints.add(open_dataset(cfg).fingerprint)
    images["gray"].write_bytes(images["gray"].read_bytes() + b"\0")
    prints.add(open_dataset(cfg).fingerprint)
    assert len(prints) == 3


def test_a_damaged_zip_member_is_left_out(cfg: DataConfig, tmp_path: Path) -> None:
    images = odd_images(tmp_path / "originals")
    for method, reason in ((zipfile.ZIP_STORED, "checksum"), (zipfile.ZIP_DEFLATED, "")):
        path = tmp_path / "damaged.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in ("gray", "rgb"):
                archive.write(images[name], images[name].name)
            middle = archive.getinfo("rgb.jpg").header_offset + 1000
        data = bytearray(path.read_bytes())
        data[middle] ^= 0x55
        path.write_bytes(data)
        dataset = open_dataset(replace(cfg, dataroot=str(path)))
        assert [dataset.key(i) for i in range(len(dataset))] == ["gray.jpg"]
        ((key, why),) = dataset.index.rejected
        assert key == "rgb.jpg"
        assert reason in why


def test_an_unreadable_file_stops_the_pass_and_keeps_nothing(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_images(Path(cfg.dataroot))

    def fail(self: FolderSource, item: int) -> np.ndarray:
        raise DataError(f"{self.key(item)}: cannot be read (Input/output error)")

    monkeypatch.setattr(FolderSource, "read", fail)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(cfg)
    assert not index_file(cfg).exists()


def test_a_full_check_finds_what_headers_hide_and_leaves_it_out(cfg: DataConfig) -> None:
    images = odd_images(Path(cfg.dataroot))
    rows = b"".join(b"\0" + row.tobytes() for row in portrait()[: HEIGHT // 2])  # half of what the header says
    data = images["rgb_png"].read_bytes()
    images["rgb_png"].write_bytes(data[:33] + png_chunk(b"IDAT", zlib.compress(rows)) + data[-12:])
    images["rgb"].write_bytes(images["rgb"].read_bytes().replace(b"\xff\xdb", b"\xff\xe5"))  # no quantization tables
    dataset = open_dataset(cfg)
    found = check_full(dataset)
    assert [key for key, _ in found] == ["rgb.jpg", "rgb_png.png"]
    assert "does not decode" in found[0][1]
    assert "fewer rows" in found[1][1]
    rest = leave_out(cfg, dataset, found)
    again = open_dataset(cfg)
    assert again.index.rejected == rest.index.rejected == found
    assert again.fingerprint == rest.fingerprint != dataset.fingerprint
    assert len(again) == len(dataset) - 2


def test_orientation_follows_exif_in_either_byte_order_and_not_a_thumbnail() -> None:
    lying = Image.fromarray(portrait(40, 60))
    for orientation in range(1, 9):
        data = with_thumbnail(jpeg_bytes(lying, exif=exif(orientation)))
        assert read_size(data, 10_000) == ((60, 40) if orientation >= 5 else (40, 60))
    buffer = io.BytesIO()
    lying.save(buffer, "PNG", exif=exif(8))
    assert read_size(buffer.getvalue(), 10_000) == (60, 40)
    little = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    plain = jpeg_bytes(lying)
    data = plain[:2] + b"\xff\xe1" + (len(little) + 2).to_bytes(2, "big") + little + plain[2:]
    assert read_size(data, 10_000) == (60, 40)


def test_no_byte_string_makes_the_header_reader_fail_otherwise() -> None:
    random = np.random.default_rng(0)
    refused = 0
    buffer = io.BytesIO()
    Image.fromarray(portrait(16, 16)).save(buffer, "PNG", exif=exif(6))
    for whole in (jpeg_bytes(Image.fromarray(portrait(16, 16)), exif=exif(6)), buffer.getvalue()):
        for _ in range(3000):
            data = np.frombuffer(whole, np.uint8)[: random.integers(len(whole) + 1)].copy()
            places = random.integers(0, max(len(data), 1), 3)
            if len(data):
                data[places] = random.integers(0, 256, 3)
            try:
                height, width = read_size(data.tobytes(), 10_000)
            except BadImage:
                refused += 1
            else:
                assert 0 < height * width <= 10_000
    assert 3000 < refused < 6000


def test_the_cache_folder_follows_config_then_xdg_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(DataConfig(cache_dir=str(tmp_path / "own"))) == tmp_path / "own"
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "dcgan-faces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "dcgan-faces"
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"data\.cache_dir: .*file/below cannot be made"):
        cache_folder(DataConfig(cache_dir=str(tmp_path / "file" / "below")))


def test_an_index_that_cannot_be_kept_does_not_stop_training(cfg: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    odd_images(Path(cfg.dataroot))
    cache_folder(cfg)
    (Path(cfg.cache_dir) / "index").touch()  # a file where a folder is needed
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(cfg)) > 0
    assert "cannot be kept" in caplog.text


def test_a_part_of_a_dataset_has_its_own_numbers_and_fingerprint(cfg: DataConfig) -> None:
    odd_images(Path(cfg.dataroot))
    source = open_source(cfg.dataroot)
    whole = Dataset(source, build_index(source, cfg.max_pixels))
    part = whole.where(np.arange(len(whole)) % 2 == 1)
    assert [part.key(i) for i in range(len(part))] == [whole.key(i) for i in range(1, len(whole), 2)]
    assert part.fingerprint != whole.fingerprint
