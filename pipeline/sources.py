"""Where the files are: a folder tree, a zip or tar shards, all read in place and numbered in the order of their keys.

A key is a file's path below the dataset's root with '/' between its parts, so the same photographs have the same keys
in a folder, a zip and a tar.  Hidden files and folders, `__MACOSX` and names without an image's ending are passed over.
Archives are memory-mapped: reading a stored member is slicing, safe from any number of threads.
Parquet and LMDB are in pipeline/parquet_source.py and pipeline/lmdb_source.py, and opened here.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import DataError
from pipeline.files import where_it_may_be

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png"}) | frozenset(
    {".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl"}
)
"""Names that promise an image, also of kinds that are not read: the index names those instead of passing them over."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstandard files."""
MAX_MAPS = 256
"""Shards mapped at once; each map holds a file descriptor, and 1024 is a common limit."""
LMDB_MAGIC = b"\xde\xc0\xef\xbe"
"""Of an LMDB's first page, at byte 16, as machines of x86's byte order write it."""
ADVICE = (
    "name a folder of images, a .zip, an LMDB, a .tar, a .parquet, or shards of the latter two"
    " (a folder of them, or a pattern such as 'a/*.tar')"
)


class DamagedMember(DataError):
    """One file of an archive cannot be had, while the others may be good."""

    def __init__(self, archive: Path, key: str, reason: str) -> None:
        super().__init__(f"{shown(archive)}: {shown(key)} {reason}")
        self.reason = reason
        """Words that follow the file's name."""
        self._arguments = archive, key, reason

    def __reduce__(self) -> tuple[type[DamagedMember], tuple[Path, str, str]]:
        return type(self), self._arguments  # travels to the other ranks; an exception's own way passes the message only


class Source(Protocol):
    """Files by number; len(), key and size cost no reading."""

    path: Path
    """What the user named."""

    def __len__(self) -> int: ...

    def key(self, item: int) -> str:
        """Path below the root with '/' between parts; unique, and ascending with the item."""
        ...

    def size(self, item: int) -> int:
        """Bytes of the file; -1 for a link that leads nowhere."""
        ...

    def checksum(self, item: int) -> int | None:
        """The CRC-32 that the container claims for the file, where it keeps one."""
        ...

    def read(self, item: int) -> np.ndarray:
        """(bytes,) uint8, read-only: the file as it is; of a stored member a view, without a copy.  Thread-safe.

        Raises:
            DamagedMember: the archive is good, this file in it is not.
            DataError: it cannot be had.
        """
        ...

    def stamp(self) -> str:
        """Changes whenever a name, a size or a time of change does: whether a kept index still holds."""
        ...


def require_named(dataroot: str) -> None:
    """
    Raises:
        ConfigError: dataroot is empty.
    """
    if not dataroot:
        raise ConfigError(f"data.dataroot must name the photographs (--data.dataroot PATH), got ''; {ADVICE}")


def open_source(dataroot: str) -> Source:
    """The files below a folder, in a zip, an LMDB, a tar or Parquet file, a folder or pattern of the latter two.

    Raises:
        ConfigError: dataroot is empty, or the package that reads this format is not installed.
        DataError: nothing there, not readable, cut short, or a member whose path leaves its archive.
    """
    require_named(dataroot)
    path = Path(dataroot).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            return _open_shards(path, _matching(path))
        with path.open("rb") as file:
            start = file.read(20)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    if start.startswith(COMPRESSED):
        raise _compressed(path)
    if path.suffix.lower() == ".zip" or start[:2] == b"PK":
        return ZipSource(path)
    if path.suffix.lower() == ".tar" or tarfile.is_tarfile(path):
        return TarSource(path, [path])
    if path.suffix.lower() == ".parquet" or start[:4] == b"PAR1":
        return _open_parquet(path, [path])
    if path.suffix.lower() in (".mdb", ".lmdb") or start[16:] == LMDB_MAGIC:
        return _open_lmdb(path)
    raise DataError(f"{shown(path)}: is no dataset; {ADVICE}")


def shown(name: object) -> str:
    """A file's name for a message of one line: names with control characters or broken encoding are quoted."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def one_line(error: BaseException) -> str:
    """The first line that an error says of itself; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Listed:
    """The part of a source that its sorted list of keys and their sizes gives; no checksums."""

    _keys: list[str]
    _sizes: np.ndarray

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, item: int) -> str:
        return self._keys[item]

    def size(self, item: int) -> int:
        return int(self._sizes[item])

    def checksum(self, item: int) -> int | None:
        return None


class FolderSource(Listed):
    """A folder and all below it.  Links are followed, each folder once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = sorted(_walk(path))
        self._keys = [key for key, _, _ in found]
        self._sizes = np.array([size for _, size, _ in found], np.int64)
        self._times = [time for _, _, time in found]

    def read(self, item: int) -> np.ndarray:
        path = self.path / self._keys[item]
        try:
            with path.open("rb", buffering=0) as file:
                return np.frombuffer(file.read(), np.uint8)
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error

    def stamp(self) -> str:
        return _hash(zip(self._keys, self._sizes.tolist(), self._times, strict=True))


class ZipSource(Listed):
    """A zip, its members stored or deflated, encrypted ones refused on reading; zip64 as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _Map(path)
        members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    key = member_key(info.filename, path)
                    if key is not None and not info.is_dir():
                        members[key] = info  # of two with one name the later holds, as on unpacking
            self._keys = sorted(members)
            infos = [members[key] for key in self._keys]
            self._offsets = np.array([info.header_offset for info in infos], np.int64)
            self._packed = np.array([info.compress_size for info in infos], np.int64)
            self._sizes = np.array([info.file_size for info in infos], np.int64)
        except (zipfile.BadZipFile, struct.error, NotImplementedError, OverflowError, ValueError) as error:
            raise DataError(f"{shown(path)}: is not a whole zip, cut short or damaged ({one_line(error)})") from error
        self._crcs = np.array([info.CRC for info in infos], np.uint32)
        self._methods = np.array([info.compress_type for info in infos], np.int32)
        self._encrypted = np.array([info.flag_bits & 1 for info in infos], bool)

    def checksum(self, item: int) -> int:
        return int(self._crcs[item])

    def read(self, item: int) -> np.ndarray:
        # Only the local header knows where the content begins: its extra field may differ from the directory's.
        key = self._keys[item]
        local = int(self._offsets[item])
        header = bytes(self._map.view(local, 30))
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DamagedMember(self.path, key, "has a damaged header in the zip")
        start = local + 30 + sum(struct.unpack_from("<HH", header, 26))
        packed = self._map.view(start, int(self._packed[item]))
        size = self.size(item)
        if len(packed) != self._packed[item]:
            raise DamagedMember(self.path, key, "reaches beyond the zip's end")
        if self._encrypted[item]:
            raise DamagedMember(self.path, key, "is encrypted")
        if self._methods[item] == zipfile.ZIP_STORED:
            if len(packed) != size:
                raise DamagedMember(self.path, key, "has two sizes in the zip")
            return packed
        if self._methods[item] != zipfile.ZIP_DEFLATED:
            raise DamagedMember(
                self.path, key, f"is packed by method {self._methods[item]}; only stored and deflated are read"
            )
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # Never more than the declared size: what a forged member would inflate to beyond it does not come to be.
            content = inflater.decompress(packed.tobytes(), max(size, 1))
            whole = len(content) == size and not inflater.decompress(inflater.unconsumed_tail, 1) and inflater.eof
        except zlib.error as error:
            raise DamagedMember(self.path, key, f"does not inflate ({one_line(error)})") from error
        if not whole:
            raise DamagedMember(self.path, key, "inflates to another size than the zip's directory says")
        return np.frombuffer(content, np.uint8)

    def stamp(self) -> str:
        listing = zip(self._keys, self._sizes.tolist(), self._crcs.tolist(), self._offsets.tolist(), strict=True)
        return _hash(listing, _size_and_time(self.path))


class Member(NamedTuple):
    """Where a file lies in tar shards."""

    shard: int
    offset: int
    size: int


class TarSource(Listed):
    """Uncompressed tar shards.  Where two shards hold the same path, every key begins with its shard's name."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self._shards = shards
        self._map = lru_cache(maxsize=MAX_MAPS)(_Map)
        listings = [_list_tar(shard, number) for number, shard in enumerate(shards)]
        repeated = any(count > 1 for count in Counter(key for listing in listings for key in listing).values())
        base = Path(os.path.commonpath([shard.parent for shard in shards]))
        members: dict[str, Member] = {}
        for shard, listing in zip(shards, listings, strict=True):
            prefix = f"{shard.relative_to(base).as_posix()}/" if repeated else ""
            members |= {prefix + key: member for key, member in listing.items()}
        self._keys = sorted(members)
        self._members = np.array([members[key] for key in self._keys], np.int64).reshape(-1, len(Member._fields))

    def size(self, item: int) -> int:
        return int(self._members[item, 2])

    def read(self, item: int) -> np.ndarray:
        member = Member(*self._members[item].tolist())
        shard = self._shards[member.shard]
        content = self._map(shard).view(member.offset, member.size)
        if len(content) != member.size:  # a shard is mapped anew now and then, and was longer when it was listed
            raise DataError(f"{shown(shard)}: {shown(self._keys[item])} reaches beyond the tar's present end")
        return content

    def stamp(self) -> str:
        shards = (part for shard in self._shards for part in (shard.name, *_size_and_time(shard)))
        return _hash(zip(self._keys, self._members.tolist(), strict=True), tuple(shards))


def _open_folder(path: Path) -> Source:
    if (path / "data.mdb").is_file():
        return _open_lmdb(path)
    folder = FolderSource(path)
    if len(folder):
        return folder
    for ending in (".tar", ".parquet"):
        shards = sorted(p for p in path.iterdir() if p.suffix.lower() == ending and not p.name.startswith("."))
        if shards:
            return _open_shards(path, shards)
    zips = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".zip")
    hint = f"; to read the zip in it, name {shown(path / zips[0])}" if zips else " (JPEG or PNG)"
    raise DataError(f"{shown(path)}: holds no image files{hint}")


def _open_shards(path: Path, shards: list[Path]) -> Source:
    return TarSource(path, shards) if shards[0].suffix.lower() == ".tar" else _open_parquet(path, shards)


def _open_parquet(path: Path, shards: list[Path]) -> Source:
    from pipeline.parquet_source import ParquetSource

    return ParquetSource(path, shards)


def _open_lmdb(path: Path) -> Source:
    from pipeline.lmdb_source import LmdbSource

    return LmdbSource(path)


def _compressed(path: Path) -> DataError:
    return DataError(f"{shown(path)}: is compressed, so it cannot be read in place; unpack it to a .tar first")


def _matching(pattern: Path) -> list[Path]:
    """The tar or Parquet shards that a pattern names, sorted."""
    if not glob.has_magic(str(pattern)):
        raise DataError(f"{shown(pattern)}: does not exist{shown(where_it_may_be(pattern))}")
    names = sorted(glob.glob(str(pattern), recursive=True))  # noqa: PTH207 (absolute ones too)
    shards = [Path(name) for name in names]
    if not shards:
        raise DataError(f"{shown(pattern)}: no file matches this pattern")
    kind = shards[0].suffix.lower()
    for shard in shards:
        if shard.suffix.lower() not in (".tar", ".parquet") or shard.suffix.lower() != kind:
            raise DataError(
                f"{shown(shard)}: matches the pattern, but a pattern takes only uncompressed .tar or only .parquet"
            )
    return shards


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """(key, bytes, time of change in ns) of every image file below the folder, in no order.

    A folder that cannot be listed is an error: the images in it would be missing without a word.
    """
    waiting = [("", os.fspath(root))]
    entered: set[tuple[int, int]] = set()  # device and inode: links may lead in circles
    while waiting:
        prefix, folder = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 (strings throughout)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(".") or name == "__MACOSX":
                        continue
                    if entry.is_dir():
                        waiting.append((f"{prefix}{name}/", entry.path))
                    elif not _names_image(name):
                        continue
                    elif entry.is_file():
                        status = entry.stat()
                        yield prefix + name, status.st_size, status.st_mtime_ns
                    elif entry.is_symlink():
                        yield prefix + name, -1, 0
        except OSError as error:
            raise DataError(f"{shown(error.filename or folder)}: cannot be read ({error.strerror})") from error


def _list_tar(path: Path, shard: int) -> dict[str, Member]:
    """The image files of one shard by key; hard links lead to the content of their target."""
    content = _Map(path)
    if bytes(content.view(0, 6)).startswith(COMPRESSED):
        raise _compressed(path)
    members: dict[str, Member] = {}
    everything: dict[str, Member] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # kept, they take 1 KB each
                key = member_key(info.name, path)
                if info.issparse():
                    raise DataError(f"{shown(path)}: member {shown(info.name)} is stored sparse, which is not read")
                if info.isreg():
                    everything[info.name] = Member(shard, info.offset_data, info.size)
                elif info.islnk() and info.linkname in everything:
                    everything[info.name] = everything[info.linkname]
                else:
                    continue
                if key is not None:
                    members[key] = everything[info.name]
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{shown(path)}: is not a whole tar, cut short or damaged ({one_line(error)})") from error
    # tarfile takes a damaged header, or the file's end between two members, for the end of the archive.
    mark = content.view(end, tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or mark.any():
        raise DataError(f"{shown(path)}: is not a whole tar, cut short or damaged at byte {end} (no end mark)")
    return members


def member_key(name: str, archive: Path) -> str | None:
    """The key of an archive's member; None for what is passed over.

    Raises:
        DataError: the path leaves the archive ('../x.jpg', '/x.jpg', 'C:/x.jpg').
    """
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[\\/]", name):
        raise DataError(f"{shown(archive)}: member {shown(name)} has a path outside the archive")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts or not _names_image(parts[-1]) or any(part[0] == "." or part == "__MACOSX" for part in parts):
        return None
    return "/".join(parts)


def _names_image(name: str) -> bool:
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in IMAGE_ENDINGS


class _Map:
    """A file, mapped read-only for as long as this or a view of it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise DataError(f"{shown(path)}: is empty")
                self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error
        self._bytes = np.frombuffer(self._mmap, np.uint8)

    def view(self, start: int, length: int) -> np.ndarray:
        """(bytes,) uint8, read-only, fewer where the file ends sooner.

        Raises:
            DataError: the file has been cut since.  Reading beyond its end would be a SIGBUS, and no error to catch.
        """
        end = min(start + length, len(self._bytes))
        size = self._mmap.size()  # the file's at this moment: 0.3 us (Xeon, 2026-11)
        if size < end:
            raise DataError(f"{shown(self.path)}: has {size} bytes, and had {len(self._bytes)} when it was opened")
        return self._bytes[start:end]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _hash(listing: Iterable[object], container: tuple[object, ...] = ()) -> str:
    """SHA-256 in hex over the representations of all entries."""
    digest = hashlib.sha256(repr(container).encode())
    for entry in listing:
        digest.update(ascii(entry).encode())
    return digest.hexdigest()
