"""Photographs as values of an LMDB, as LSUN is distributed: a folder with data.mdb, or one file.

The database is opened for reading only, without a lock file, so that it may lie on a disk that cannot be written.  Keys
are arbitrary bytes.  One that is a path with an image's ending is the photograph's key as it is, so that the same
photographs have the same keys as in a folder; any other gets an ending, and one that is no plain text stands in hex.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import DataError
from pipeline.parquet_source import image_ending
from pipeline.sources import DamagedMember, Listed, member_key, one_line, shown


class LmdbSource(Listed):
    """An LMDB's values, numbered in the order of their keys as text.  Thread-safe, also after a fork.

    Raises:
        ConfigError: the package lmdb is not installed.
        DataError: it is no LMDB, is cut short, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "data.mdb" if path.is_dir() else path
        self._lmdb = _package(path)
        status = _status(self._file)
        self._bytes, self._time = status.st_size, status.st_mtime_ns
        self._environment = _shared(self._lmdb, self._file)
        found: list[tuple[bytes, int]] = []
        first = b""
        try:
            with self._reading(buffers=True) as transaction:
                # The lengths stand beside the keys; of the values only the first ones that are not empty are touched.
                for key, value in transaction.cursor():
                    if not first and len(value) < self._bytes:
                        first = bytes(value[:16])
                    found.append((bytes(key), len(value)))
        except self._lmdb.Error as error:
            raise DataError(f"{shown(self._file)}: is damaged ({_words(error)})") from error
        if not found:
            raise DataError(f"{shown(self._file)}: is an LMDB without entries")
        texts = _texts([key for key, _ in found], image_ending(first))
        order = sorted(range(len(found)), key=texts.__getitem__)
        self._keys = [texts[i] for i in order]
        self._names = [found[i][0] for i in order]
        self._sizes = np.array([found[i][1] for i in order], np.int64)

    def read(self, item: int) -> np.ndarray:
        if self._sizes[item] >= self._bytes:
            raise DamagedMember(self._file, self._keys[item], "has a damaged entry: it is longer than the whole LMDB")
        size = _status(self._file).st_size
        if size < self._bytes:  # reading a map beyond its file's end would be a SIGBUS, and no error to catch
            raise DataError(f"{shown(self._file)}: has {size} bytes, and had {self._bytes} when it was opened")
        try:
            with self._reading() as transaction:
                content = transaction.get(self._names[item])
        except self._lmdb.Error as error:
            raise DamagedMember(self._file, self._keys[item], f"cannot be read ({_words(error)})") from error
        if content is None:
            raise DamagedMember(self._file, self._keys[item], "is not there any more")
        return np.frombuffer(content, np.uint8)

    def stamp(self) -> str:
        digest = hashlib.sha256(f"{self._bytes} {self._time}".encode())
        for key, size in zip(self._names, self._sizes.tolist(), strict=True):
            digest.update(b"%d %d %b" % (len(key), size, key))
        return digest.hexdigest()

    @contextlib.contextmanager
    def _reading(self, *, buffers: bool = False) -> Iterator[Any]:
        """A transaction: a view of the database as it stood at one moment."""
        if self._environment.pid != os.getpid():  # an environment is not to be used on the other side of a fork
            self._environment = _shared(self._lmdb, self._file)
        with self._environment.opened.begin(buffers=buffers) as transaction:
            yield transaction


class _Environment:
    """A database that is open in this process; LMDB allows each to be opened only once."""

    def __init__(self, lmdb: Any, file: Path) -> None:
        self.pid = os.getpid()
        size = _status(file).st_size
        if size == 0:
            raise DataError(f"{shown(file)}: is empty")
        try:
            # With read-ahead, the system would read a value's neighbours, and training takes values in no order.
            self.opened = lmdb.open(
                os.fspath(file), subdir=False, readonly=True, lock=False, readahead=False, create=False
            )
            promised = (self.opened.info()["last_pgno"] + 1) * self.opened.stat()["psize"]
        except lmdb.Error as error:
            raise DataError(f"{shown(file)}: is not a whole LMDB ({_words(error)})") from error
        if size < promised:
            raise DataError(f"{shown(file)}: is cut short: it has {size} bytes and promises {promised}")


_ENVIRONMENTS: WeakValueDictionary[str, _Environment] = WeakValueDictionary()
_OPENING = threading.Lock()


def _shared(lmdb: Any, file: Path) -> _Environment:
    """The environment of this file, opened where this process has not yet."""
    name = os.path.realpath(file)
    with _OPENING:
        environment = _ENVIRONMENTS.get(name)
        if environment is not None and environment.pid != os.getpid():
            environment.opened.close()  # this process's share of it; the one that opened it keeps its own
            environment = None
        if environment is None:
            environment = _ENVIRONMENTS[name] = _Environment(lmdb, Path(name))
        return environment


def _texts(keys: list[bytes], ending: str) -> list[str]:
    """A key of a Source for each key of the database, all different."""
    texts = [_text(key, ending) for key in keys]
    return texts if len(set(texts)) == len(texts) else [key.hex() + ending for key in keys]


def _text(key: bytes, ending: str) -> str:
    with contextlib.suppress(UnicodeDecodeError, DataError):
        text = key.decode()
        for name in (text, text + ending):
            if text.isprintable() and member_key(name, Path()) == name:
                return name
    return key.hex() + ending


def _words(error: Exception) -> str:
    """What LMDB says, without the file's name that it puts first."""
    return one_line(error).split(": ", 1)[-1]


def _status(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{shown(file)}: cannot be read ({error.strerror})") from error


def _package(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError(
            f"data.dataroot {shown(path)} is an LMDB, and the package for it is missing: pip install -e '.[lmdb]'"
        ) from error
    return lmdb
