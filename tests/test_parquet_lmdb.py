"""Parquet and LMDB: the same photographs under the same keys as in a folder, and one line for what cannot be read."""

from __future__ import annotations

import importlib
import io
import os
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import index, parquet_source
from pipeline.cli import prepare
from pipeline.config import ConfigError, DataConfig
from pipeline.decode.pillow import PillowDecoder
from pipeline.errors import DataError
from pipeline.index import Dataset, build_index, open_dataset
from pipeline.sources import DamagedMember, Source, open_source
from tests.images import jpeg_bytes, portrait

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
lmdb = pytest.importorskip("lmdb")

PHOTOS = {
    f"{name}.jpg": jpeg_bytes(Image.fromarray(np.roll(portrait(), shift, 1))) for shift, name in enumerate("abcdef")
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GOOD = PHOTOS["a.jpg"]
MAX_PIXELS = DataConfig().max_pixels


def rows(photos: dict[str, bytes]) -> list[dict[str, object]]:
    return [{"bytes": content, "path": path} for path, content in photos.items()]


def parquet_of(path: Path, values: list[object], kind: pa.DataType = IMAGE, group: int = 2, **options: object) -> Path:
    """A Parquet file as Hugging Face writes it: the photographs, and a label that nobody reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"label": [0] * len(values), "image": pa.array(values, kind)})
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def lmdb_of(path: Path, values: dict[bytes, bytes], *, subdir: bool = True) -> Path:
    with lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment, environment.begin(write=True) as writing:
        for key, value in values.items():
            writing.put(key, value)
    return path


def contents(source: Source) -> dict[str, bytes]:
    return {source.key(i): source.read(i).tobytes() for i in range(len(source))}


def rejected(source: Source) -> dict[str, str]:
    return dict(build_index(source, MAX_PIXELS).rejected)


def refusal(path: Path, match: str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind, match=match) as error:
        open_source(str(path))
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


def pixels(source: Source) -> np.ndarray:
    dataset = Dataset(source, build_index(source, MAX_PIXELS))
    decoder = PillowDecoder(dataset, (32, 32), 3, 1)
    try:
        return np.stack([window.copy() for window in next(decoder.windows(iter([np.arange(len(dataset))])))])
    finally:
        decoder.close()


def test_the_same_photographs_have_the_same_keys_pixels_and_fingerprint_in_every_format(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in PHOTOS.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in PHOTOS.items():
            archive.writestr(name, content)
    backwards = list(reversed(rows(PHOTOS)))
    parquet_of(tmp_path / "one.parquet", backwards)
    parquet_of(tmp_path / "shards" / "0.parquet", backwards[:3])
    parquet_of(tmp_path / "shards" / "1.parquet", backwards[3:], compression="zstd")
    lmdb_of(tmp_path / "db", {name.encode(): content for name, content in PHOTOS.items()})
    lmdb_of(tmp_path / "single", {name.encode(): content for name, content in PHOTOS.items()}, subdir=False)
    names = ["folder", "set.zip", "one.parquet", "shards", "shards/*.parquet", "db", "single"]
    sources = [open_source(str(tmp_path / name)) for name in names]
    expected = pixels(sources[0])
    for source in sources:
        assert contents(source) == PHOTOS
        assert [source.key(i) for i in range(len(source))] == sorted(PHOTOS)
        assert [source.size(i) for i in range(len(source))] == [len(content) for content in PHOTOS.values()]
        assert not source.read(0).flags.writeable
        assert build_index(source, MAX_PIXELS).fingerprint == build_index(sources[0], MAX_PIXELS).fingerprint
        assert np.array_equal(pixels(source), expected)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_of(tmp_path / "a.parquet", rows(PHOTOS))
    lmdb_of(tmp_path / "db", PHOTOS_BY_BYTES)
    for package, name in (("pyarrow", "a.parquet"), ("lmdb", "db")):
        monkeypatch.setitem(sys.modules, package, None)
        extra = {"pyarrow": "parquet"}.get(package, package)
        assert f"pip install -e '.[{extra}]'" in refusal(tmp_path / name, "package for it is missing", ConfigError)


PHOTOS_BY_BYTES = {name.encode(): content for name, content in PHOTOS.items()}


def test_many_threads_read_the_same_bytes(tmp_path: Path) -> None:
    files = {f"{i:03}.jpg": bytes([i]) * (500 + i) for i in range(200)}
    parquet_of(tmp_path / "a.parquet", rows(files), group=7)
    lmdb_of(tmp_path / "db", {name.encode(): content for name, content in files.items()})
    with ThreadPoolExecutor(8) as pool:
        for name in ("a.parquet", "db"):
            source = open_source(str(tmp_path / name))
            for i, data in enumerate(pool.map(source.read, list(range(len(source))) * 3)):
                assert data.tobytes() == files[source.key(i % 200)]


def test_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    for make in (
        lambda photos: parquet_of(tmp_path / "a.parquet", rows(photos)),
        lambda photos: lmdb_of(tmp_path / "a.lmdb", {k.encode(): v for k, v in photos.items()}, subdir=False),
    ):
        path = make(PHOTOS)
        first = open_source(str(path)).stamp()
        assert open_source(str(path)).stamp() == first
        make(PHOTOS | {"z.jpg": GOOD})
        assert open_source(str(path)).stamp() != first


def test_garbled_cut_null_and_huge_values_are_left_out_and_named_by_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_FILE_BYTES", 50_000)
    bad = {
        "cut.jpg": GOOD[: len(GOOD) * 2 // 3],
        "empty.jpg": b"",
        "noise.jpg": b"\0\1" * 50,
        "webp.jpg": b"RIFF\x10\0\0\0WEBPVP8 ",
    }
    huge = {"huge.jpg": b"\xff" * 50_001}
    values = [*rows(PHOTOS | bad | huge), {"bytes": None, "path": "elsewhere.jpg"}]
    reasons = {
        "cut.jpg": "is cut short: no JPEG end marker",
        "empty.jpg": "is empty",
        "noise.jpg": "is neither JPEG nor PNG",
        "webp.jpg": "is WebP, neither JPEG nor PNG",
        "huge.jpg": "has 50001 bytes, more than 50000",
    }
    null = {"elsewhere.jpg": "has no bytes in its row (null)"}
    assert rejected(open_source(str(parquet_of(tmp_path / "a.parquet", values)))) == reasons | null
    values_by_bytes = {name.encode(): content for name, content in (PHOTOS | bad | huge).items()}
    assert rejected(open_source(str(lmdb_of(tmp_path / "db", values_by_bytes)))) == reasons


def test_the_index_command_works_on_them_and_packs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet_of(tmp_path / "a.parquet", [GOOD, None, GOOD], pa.binary())
    lmdb_of(tmp_path / "db", {b"\x00\xff": GOOD, b"0a1b": GOOD, b"notes": b"no photograph"})
    expected = {
        "a.parquet": ["a.parquet/000000.jpg", "a.parquet/000002.jpg"],
        "db": ["00ff.jpg", "0a1b.jpg"],
    }
    for name, keys in expected.items():
        place, out = str(tmp_path / name), tmp_path / f"{name}.zip"
        assert prepare.main(["index", place, "--cache_dir", str(tmp_path / "cache")]) == 0
        assert "2 images, 1 files left out" in capsys.readouterr().out
        assert prepare.main(["pack", place, str(out)]) == 0
        assert list(contents(open_source(str(out)))) == keys
        capsys.readouterr()


def test_a_set_without_a_photograph_is_one_line(tmp_path: Path) -> None:
    """Paths to files that lie elsewhere, and LSUN's own WebP."""
    parquet_of(tmp_path / "a.parquet", [{"bytes": None, "path": "x.jpg"}] * 2)
    lmdb_of(tmp_path / "db", {b"0a": b"RIFF\x10\0\0\0WEBPVP8 "})
    for name, reason in (
        ("a.parquet", r"none of its 2 files .* a\.parquet/000000\.jpg has no bytes in its row"),
        ("db", r"none of its 1 files .* 0a\.webp is WebP, neither JPEG nor PNG"),
    ):
        with pytest.raises(DataError, match=reason):
            open_dataset(DataConfig(dataroot=str(tmp_path / name), cache_dir=str(tmp_path / "cache")))


# Parquet


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(["x.jpg", "x.jpg"], id="repeated"),
        pytest.param(["x.jpg", None], id="missing"),
        pytest.param(["/home/someone/x.jpg", "/home/someone/y.jpg"], id="absolute"),
        pytest.param(["../x.jpg", "y.jpg"], id="outside"),
        pytest.param(["x", "y"], id="without an ending"),
    ],
)
def test_rows_whose_paths_cannot_be_keys_are_numbered(tmp_path: Path, paths: list[str | None]) -> None:
    for shard in ("a", "b"):
        parquet_of(tmp_path / f"{shard}.parquet", [{"bytes": GOOD, "path": path} for path in paths])
    keys = list(contents(open_source(str(tmp_path))))
    assert keys == ["a.parquet/000000.jpg", "a.parquet/000001.jpg", "b.parquet/000000.jpg", "b.parquet/000001.jpg"]


def test_the_ending_of_numbered_rows_is_that_of_the_first_photograph(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(portrait()).save(png, "PNG")
    parquet_of(tmp_path / "a.parquet", [None, png.getvalue()], pa.large_binary())
    assert list(rejected(open_source(str(tmp_path / "a.parquet")))) == ["a.parquet/000000.png"]


def test_the_column_of_photographs_is_found_among_others(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    embedding, image = pa.array([b"\1\2\3"]), pa.array([{"bytes": GOOD, "path": "x.jpg"}], IMAGE)
    many = {"embedding": embedding, "n": [1], "words": ["x.jpg"], "list": [[b"1"]]}
    pq.write_table(pa.table(many | {"face": image}), path)
    assert contents(open_source(str(path))) == {"x.jpg": GOOD}
    pq.write_table(pa.table(many | {"mask": image, "image": image}), path)
    assert contents(open_source(str(path))) == {"x.jpg": GOOD}
    pq.write_table(pa.table(many | {"jpg": pa.array([GOOD])}), path)
    assert contents(open_source(str(path))) == {"a.parquet/000000.jpg": GOOD}


def test_no_column_or_several_that_could_be_meant_are_named(tmp_path: Path) -> None:
    image = pa.array([{"bytes": GOOD, "path": "x.jpg"}], IMAGE)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"label": [1], "words": ["x.jpg"]}), path)
    assert "label (int64), words (string)" in refusal(path, "has no image column")
    pq.write_table(pa.table({"left": image, "right": image}), path)
    refusal(path, "2 columns could be the photographs: left, right; call the one that is meant image")
    parquet_of(tmp_path / "set" / "0.parquet", rows(PHOTOS))
    pq.write_table(pa.table({"label": [1]}), tmp_path / "set" / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet: has no image column image, unlike 0\.parquet"):
        open_source(str(tmp_path / "set"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_parquet_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = parquet_of(tmp_path / "cut.parquet", rows(PHOTOS))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path, "is not a whole Parquet file")


def test_what_is_no_parquet_or_has_no_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet file" * 100)
    refusal(tmp_path / "text.parquet", "is not a whole Parquet file")
    refusal(parquet_of(tmp_path / "none.parquet", []), "has no rows")
    parquet_of(tmp_path / "set" / "a.parquet", rows(PHOTOS))
    (tmp_path / "set" / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match="a pattern takes only"):
        open_source(str(tmp_path / "set" / "*"))


def test_a_damaged_row_group_takes_only_its_own_rows_with_it(tmp_path: Path) -> None:
    path = parquet_of(
        tmp_path / "a.parquet", rows(PHOTOS), use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    leaf = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[leaf.data_page_offset + leaf.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    source = open_source(str(path))
    assert rejected(source).keys() == {"c.jpg", "d.jpg"}
    assert "lies in row group 1, which does not unpack" in rejected(source)["c.jpg"]
    assert source.size(2) == 0
    with pytest.raises(DamagedMember, match=r"a\.parquet: c\.jpg lies in row group 1"):
        source.read(2)


def test_a_parquet_file_changed_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "a.parquet", rows(PHOTOS))
    source = open_source(str(path))
    with path.open("rb+") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=r"a\.parquet: has changed since it was opened"):
        source.read(5)


def test_only_so_many_unpacked_bytes_are_kept_and_each_group_is_unpacked_once_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i:02}.jpg": bytes([i]) * 1000 for i in range(40)}
    monkeypatch.setattr(parquet_source, "KEPT_BYTES", 25_000)  # two groups of ten, with their offsets
    source = open_source(str(parquet_of(tmp_path / "a.parquet", rows(files), group=10)))
    unpacked: list[int] = []
    real = type(source)._unpack
    monkeypatch.setattr(
        type(source), "_unpack", lambda self, group: (unpacked.append(group.number), real(self, group))[1]
    )
    together = threading.Barrier(8)

    def read_all(start: int) -> None:
        together.wait()
        for i in range(40):
            source.read(i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_all, range(8)))
    assert sorted(set(unpacked)) == [0, 1, 2, 3]
    unpacked.clear()
    for item in (0, 10, 0, 10, 20, 10, 0):
        source.read(item)
    assert unpacked == [0, 1, 2, 0]


def test_a_row_group_too_large_for_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "MAX_GROUP_BYTES", 5000)
    refusal(parquet_of(tmp_path / "a.parquet", rows(PHOTOS), group=6), r"row group 0 holds \d+ bytes .*row_group_size")


# LMDB


def test_keys_that_are_no_paths_get_an_ending_or_stand_in_hex(tmp_path: Path) -> None:
    lmdb_of(tmp_path / "db", {b"a!": GOOD, b"a": GOOD, b"b/c.jpeg": GOOD, b"\xffz": GOOD, b"../x": GOOD, b"\n": GOOD})
    source = open_source(str(tmp_path / "db"))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == sorted(["a!.jpg", "a.jpg", "b/c.jpeg", "ff7a.jpg", "2e2e2f78.jpg", "0a.jpg"])
    lmdb_of(tmp_path / "twins", {b"a": GOOD, b"a.jpg": GOOD + b"\0"})
    assert contents(open_source(str(tmp_path / "twins"))) == {"61.jpg": GOOD, "612e6a7067.jpg": GOOD + b"\0"}


def test_an_lmdb_on_a_disk_that_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    lmdb_of(tmp_path / "db", PHOTOS_BY_BYTES)
    (tmp_path / "db" / "lock.mdb").unlink()
    before = (tmp_path / "db" / "data.mdb").read_bytes()
    first, second = open_source(str(tmp_path / "db")), open_source(str(tmp_path / "db"))
    assert contents(first) == contents(second) == PHOTOS
    assert [path.name for path in (tmp_path / "db").iterdir()] == ["data.mdb"]
    assert (tmp_path / "db" / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("num_bytes", [0, 100, 5000, 8192, 20_000])
def test_an_lmdb_cut_short_is_refused(tmp_path: Path, num_bytes: int) -> None:
    path = lmdb_of(tmp_path / "db", PHOTOS_BY_BYTES)
    data = (path / "data.mdb").read_bytes()
    assert num_bytes < len(data)
    (path / "data.mdb").write_bytes(data[:num_bytes])
    with pytest.raises(DataError, match=r"is cut short|is empty|is not a whole LMDB") as error:
        open_source(str(path))
    assert "\n" not in str(error.value)


def test_what_is_no_lmdb_or_has_no_entries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mdb").write_text("no LMDB" * 2000)
    refusal(tmp_path / "text.mdb", "is not a whole LMDB")
    lmdb_of(tmp_path / "none", {})
    with pytest.raises(DataError, match="without entries"):
        open_source(str(tmp_path / "none"))


def test_an_lmdb_cut_after_it_was_opened_is_an_error_beyond_its_end(tmp_path: Path) -> None:
    """Reading the map there would end the process with SIGBUS."""
    source = open_source(str(lmdb_of(tmp_path / "db", PHOTOS_BY_BYTES)))
    with (tmp_path / "db" / "data.mdb").open("rb+") as file:
        file.truncate(8192)
    with pytest.raises(DataError, match=r"data\.mdb: has 8192 bytes, and had"):
        source.read(0)


def test_a_forked_process_reads_too(tmp_path: Path) -> None:
    source = open_source(str(lmdb_of(tmp_path / "db", PHOTOS_BY_BYTES)))
    pid, same = os.fork(), False
    if pid == 0:
        try:
            same = contents(source) == PHOTOS
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert contents(source) == PHOTOS


def test_the_modules_themselves_need_neither_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "lmdb"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("pipeline.parquet_source", "pipeline.lmdb_source"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)
