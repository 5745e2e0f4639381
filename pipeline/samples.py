"""The files as decoders take them: each held against the index, and a bad one replaced by the next good one.

A file may change or vanish after it was indexed, and one with a good header may not decode.  In place of item i comes
the first of i + 1, i + 2, ... (after the last one: 0) that is good.  That depends on nothing but which files are bad,
so neither ranks, threads nor reading ahead change which image is taken.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.config import DataConfig
from pipeline.errors import DataError
from pipeline.index import Dataset
from pipeline.sources import shown


class Sample(NamedTuple):
    """One file, read."""

    item: int
    """Row of the dataset: the one asked for, or the one in its place."""
    data: np.ndarray
    """(bytes,) uint8, read-only: the file."""
    size: tuple[int, int]
    """Height and width in pixels, after EXIF rotation."""
    key: str


class Samples:
    """Reads a dataset's files and keeps a list of those that proved bad.  Thread-safe; reads run side by side."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._lock = threading.Lock()
        self._bad: set[int] = set()
        self._replaced: dict[str, str] = {}

    @classmethod
    def of(cls, source: Samples | Dataset) -> Samples:
        return source if isinstance(source, Samples) else cls(source)

    @property
    def replaced(self) -> list[tuple[str, str]]:
        """Key and reason of each bad file, in the order they were found; the reason's words follow the key."""
        with self._lock:
            return list(self._replaced.items())

    @property
    def num_replaced(self) -> int:
        return len(self._replaced)

    @property
    def num_bad(self) -> int:
        """Files that read() passes over: those of num_replaced without what was only noted."""
        return len(self._bad)

    def read(self, item: int) -> Sample:
        """The file of this item, or of the next good one.

        Raises:
            DataError: no file of the dataset is good any more.
        """
        for step in range(len(self.dataset)):
            taken = (item + step) % len(self.dataset)
            if taken in self._bad:
                continue
            try:
                data = self._checked(taken)
            except DataError as error:
                self.reject(taken, error)
            else:
                return Sample(taken, data, self.dataset.size(taken), self.dataset.key(taken))
        key, reason = self.replaced[0]
        raise DataError(f"none of the {len(self.dataset)} images can be used any more; {shown(key)} {reason}")

    def _checked(self, item: int) -> np.ndarray:
        """The file as it was indexed.  The CRC-32 takes 2 us for 10 kB, beside 8 us to read them (Xeon, 2026-11)."""
        data, key = self.dataset.read(item), shown(self.dataset.key(item))
        if zlib.crc32(data.data) != self.dataset.index.crcs[item]:
            size = self.dataset.source.size(int(self.dataset.index.items[item]))
            if len(data) != size:
                raise DataError(f"{key} has {len(data)} bytes, and had {size} when it was indexed")
            raise DataError(f"{key} has other content than when it was indexed")
        return data

    def reject(self, item: int, reason: str | DataError) -> None:
        """Record a bad file, such as one that does not decode: from now on read() gives the next one for it.

        Args:
            reason: words that follow the file's name, or the error that names it.
        """
        key = self.dataset.key(item)
        if isinstance(reason, DataError):
            _, name, words = str(reason).rpartition(shown(key))
            reason = words.lstrip(": ") if name else f"cannot be read ({words})"  # nameless: of its archive
        with self._lock:
            self._bad.add(item)
            self._replaced.setdefault(key, reason)

    def note(self, key: str, reason: str) -> None:
        """Record a file that an earlier run replaced in decoded images which are used again."""
        with self._lock:
            self._replaced.setdefault(key, reason)


def check_share(cfg: DataConfig, replaced: Sequence[tuple[str, str]], num_images: int) -> None:
    """Raises DataError where more files proved bad than the settings allow."""
    if len(replaced) > cfg.bad_allowed(num_images):
        rule = "data.strict is set" if cfg.strict else f"data.max_bad_fraction is {cfg.max_bad_fraction:g}"
        key, reason = replaced[0]
        found = f"{len(replaced)} of {num_images} images proved bad after they were indexed"
        raise DataError(f"{found} ({rule}): {shown(key)} {reason}")
