"""Sources: the same files and keys whatever holds them, and one line for what cannot be read."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.errors import DataError
from pipeline.sources import DamagedMember, Source, open_source

FILES = {
    "b.jpg": b"second" * 40,
    "a/z.PNG": b"first of a" * 20,
    "a/b c/ü.jpeg": b"\xff\xd9" * 99,
    "empty.jpg": b"",
}
PASSED_OVER = {
    ".hidden.jpg": b"x",
    ".thumbnails/a.jpg": b"x",
    "__MACOSX/b.jpg": b"x",
    "readme.txt": b"x",
    "noending": b"x",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (FILES | PASSED_OVER).items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "set"


def zip_of(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def contents(source: Source) -> dict[str, bytes]:
    return {source.key(i): source.read(i).tobytes() for i in range(len(source))}


def test_every_container_gives_the_same_keys_bytes_and_order(folder: Path, tmp_path: Path) -> None:
    everything = FILES | PASSED_OVER
    sources = [
        open_source(str(folder)),
        open_source(str(zip_of(tmp_path / "stored.zip", everything))),
        open_source(str(zip_of(tmp_path / "deflated.zip", everything, zipfile.ZIP_DEFLATED))),
        open_source(str(tar_of(tmp_path / "one.tar", {f"./{name}": data for name, data in everything.items()}))),
    ]
    for source in sources:
        assert contents(source) == FILES
        keys = [source.key(i) for i in range(len(source))]
        assert keys == sorted(FILES)
        assert [source.size(i) for i in range(len(source))] == [len(FILES[key]) for key in keys]


def test_tar_shards_are_one_set_named_by_folder_or_pattern(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    tar_of(tmp_path / "shards" / "0.tar", {"0.jpg": b"a", "1.jpg": b"bb"})
    tar_of(tmp_path / "shards" / "1.tar", {"2.jpg": b"c" * 600})
    expected = {"0.jpg": b"a", "1.jpg": b"bb", "2.jpg": b"c" * 600}
    assert contents(open_source(str(tmp_path / "shards"))) == expected
    assert contents(open_source(str(tmp_path / "shards" / "[01].tar"))) == expected


def test_shards_that_repeat_a_path_prefix_their_names(tmp_path: Path) -> None:
    for shard in ("x", "y"):
        tar_of(tmp_path / f"{shard}.tar", {"0.jpg": shard.encode(), f"{shard}.jpg": b"z"})
    assert contents(open_source(str(tmp_path))) == {
        "x.tar/0.jpg": b"x",
        "x.tar/x.jpg": b"z",
        "y.tar/0.jpg": b"y",
        "y.tar/y.jpg": b"z",
    }


def test_a_hard_link_in_a_tar_leads_to_its_content(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"a.jpg": b"content"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    assert contents(open_source(str(tmp_path / "a.tar"))) == {"a.jpg": b"content", "b.jpg": b"content"}


def test_links_in_a_folder_are_followed_and_circles_end(folder: Path) -> None:
    (folder / "again").symlink_to(folder)
    (folder / "link.jpg").symlink_to(folder / "b.jpg")
    (folder / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    source = open_source(str(folder))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == sorted([*FILES, "link.jpg", "lost.jpg"])
    assert source.size(keys.index("lost.jpg")) == -1


def test_many_threads_read_the_same_bytes(tmp_path: Path) -> None:
    files = {f"{i}.jpg": bytes([i]) * (500 + i) for i in range(200)}
    sources = [
        open_source(str(zip_of(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED))),
        open_source(str(tar_of(tmp_path / "a.tar", files))),
    ]
    with ThreadPoolExecutor(8) as pool:
        for source in sources:
            for i, data in enumerate(pool.map(source.read, list(range(len(source))) * 3)):
                assert data.tobytes() == files[source.key(i % 200)]


def test_a_stored_member_is_a_view_that_outlives_its_source(tmp_path: Path) -> None:
    source = open_source(str(zip_of(tmp_path / "a.zip", {"a.jpg": b"content" * 100})))
    data = source.read(0)
    del source
    assert data.base is not None
    assert not data.flags.writeable
    assert data.tobytes() == b"content" * 100


def test_zip64_is_read_in_place(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
        archive.open(zipfile.ZipInfo("a.jpg"), "w", force_zip64=True) as file,
    ):
        file.write(b"content")
    zip_of(tmp_path / "many.zip", {f"{i}.jpg": b"" for i in range(66_000)})  # above 65,535 only zip64 counts them
    assert contents(open_source(str(tmp_path / "a.zip"))) == {"a.jpg": b"content"}
    assert len(open_source(str(tmp_path / "many.zip"))) == 66_000


def test_the_stamp_changes_with_names_sizes_and_times(folder: Path, tmp_path: Path) -> None:
    def stamp() -> str:
        return open_source(str(folder)).stamp()

    first = stamp()
    assert stamp() == first
    (folder / "b.jpg").write_bytes(b"longer" * 50)
    second = stamp()
    (folder / "b.jpg").rename(folder / "c.jpg")
    third = stamp()
    (folder / "readme.txt").write_text("no image, no change")
    assert len({first, second, third}) == 3
    assert stamp() == third


def forged(path: Path, declared: int) -> Source:
    """A zip whose only member claims another size than it inflates to."""
    zip_of(path, {"a.jpg": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2")
    data[entry + 24 : entry + 28] = struct.pack("<I", declared)
    path.write_bytes(data)
    return open_source(str(path))


@pytest.mark.parametrize("declared", [0, 10, 2_000_000])
def test_a_member_never_inflates_beyond_the_size_it_declares(
    tmp_path: Path, declared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = forged(tmp_path / "bomb.zip", declared)
    largest = 0
    real = zlib.decompressobj

    class Watched:
        def __init__(self, *arguments: int) -> None:
            self.real = real(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal largest
            out = self.real.decompress(data, limit)
            largest = max(largest, len(out))
            return out

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(DamagedMember, match="another size"):
        source.read(0)
    assert largest <= max(declared, 1)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_paths_that_are_no_dataset_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no dataset")
    (tmp_path / "zips").mkdir()
    zip_of(tmp_path / "zips" / "faces.zip", FILES)
    tar_of(tmp_path / "a.tar.gz", FILES, "w:gz")
    tar_of(tmp_path / "disguised.tar", FILES, "w:xz")
    (tmp_path / "nothing.zip").touch()
    rows = {
        "missing": "does not exist",
        "*.tar.none": "no file matches",
        "empty": "holds no image files",
        "zips": "faces.zip",
        "notes.txt": "is no dataset",
        "a.tar.gz": "unpack it",
        "disguised.tar": "unpack it",
        "nothing.zip": "is empty",
        "new\nline": "does not exist",
    }
    for name, rule in rows.items():
        with pytest.raises(DataError) as error:
            open_source(str(tmp_path / name))
        text = one_line(error)
        assert rule in text
        assert name in text or name == "new\nline"
        assert error.value.exit_code == 65
    with pytest.raises(ConfigError, match=r"data\.dataroot"):
        open_source("")


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999])
def test_an_archive_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    files = {f"{i}.jpg": bytes([i]) * 3000 for i in range(20)}
    for path in (zip_of(tmp_path / "cut.zip", files), tar_of(tmp_path / "cut.tar", files)):
        data = path.read_bytes()
        if path.suffix == ".tar":
            data = data[: 20 * 3584]  # without the padding to 10,240 bytes that follows the last member
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match="cut short") as error:
            open_source(str(path))
        assert str(path) in one_line(error)


def test_a_tar_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "cut.tar", {"a.jpg": b"a" * 512, "b.jpg": b"b" * 512})
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match="cut short"):
        open_source(str(path))


def test_an_archive_cut_after_it_was_opened_is_an_error_beyond_its_end(tmp_path: Path) -> None:
    """Where a page is gone, reading the map itself would end the process with SIGBUS."""
    files = {f"{i}.jpg": bytes([i]) * 9000 for i in range(4)}
    for path in (zip_of(tmp_path / "cut.zip", files), tar_of(tmp_path / "cut.tar", files)):
        mapped, not_yet = open_source(str(path)), open_source(str(path))
        mapped.read(0)
        with path.open("rb+") as file:
            file.truncate(20_000)
        for source in (mapped, not_yet):
            assert source.read(0).tobytes() == files["0.jpg"]
            for item in (2, 3):
                with pytest.raises(DataError, match=r"has 20000 bytes, and had|beyond the tar's present end") as error:
                    source.read(item)
                assert str(path) in one_line(error)


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/x.jpg", "..\\x.jpg", "C:\\x.jpg"])
def test_a_member_outside_its_archive_refuses_the_archive(tmp_path: Path, name: str) -> None:
    for path in (
        zip_of(tmp_path / "a.zip", {"good.jpg": b"x", name: b"x"}),
        tar_of(tmp_path / "a.tar", {"good.jpg": b"x", name: b"x"}),
    ):
        with pytest.raises(DataError, match="outside the archive") as error:
            open_source(str(path))
        assert str(path) in one_line(error)


def test_what_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(folder))

    def refuse(path: Path, *_: object, **__: object) -> io.BytesIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"b\.jpg: cannot be read \(Permission denied\)"):
        source.read([source.key(i) for i in range(len(source))].index("b.jpg"))


def test_encrypted_members_and_rare_methods_are_damaged_members(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a.jpg": b"x" * 100}, zipfile.ZIP_BZIP2)
    with pytest.raises(DamagedMember, match="packed by method 12"):
        open_source(str(path)).read(0)
    path = zip_of(tmp_path / "b.zip", {"a.jpg": b"x" * 100})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DamagedMember, match=r"b\.zip: a\.jpg is encrypted"):
        open_source(str(path)).read(0)


def test_a_damaged_member_travels_between_ranks() -> None:
    error = DamagedMember(Path("a.zip"), "b.jpg", "is cut short")
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.reason) == (DamagedMember, str(error), "is cut short")
