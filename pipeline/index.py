"""What is in a dataset: one pass over its files, once, kept in the cache folder.

Every file is read, its header parsed (pipeline/headers.py) and its CRC-32 taken; nothing is decoded.  Bad files are
counted, named and left out, so that no decoder ever meets them.  The kept index holds as long as the listing does: a
new name, size or time of change makes a new pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import struct
import threading
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.errors import DataError, StorageError
from pipeline.headers import PNG_SIGNATURE, BadImage, check_png_content, read_size
from pipeline.sources import DamagedMember, Source, one_line, open_source, shown

log = logging.getLogger(__name__)
T = TypeVar("T")

VERSION = 1
"""Of the kept file and of the rules by which files are refused: a change of either makes a new pass."""
MAX_FILE_BYTES = 64 << 20
"""A larger file is left out unread: with several threads reading, memory stays under 2 GB."""
THREADS = 4
"""Reads wait for the disk or the network, and CRC and reading let other threads run."""
ITEMS_PER_TASK = 256
LARGE_PIXELS = 8_000_000
"""Images above it are decoded one at a time in a full check: a progressive JPEG takes about 9 bytes a pixel."""


@dataclass(frozen=True)
class Index:
    """The accepted images, in the order of their keys, and the files left out."""

    items: np.ndarray
    """(n,) int64: the source's number of each image."""
    heights: np.ndarray
    """(n,) int32: pixels, after EXIF rotation."""
    widths: np.ndarray
    """(n,) int32: pixels, after EXIF rotation."""
    crcs: np.ndarray
    """(n,) uint32: CRC-32 of the file's bytes."""
    rejected: tuple[tuple[str, str], ...]
    """Key and reason of each file left out, in the order of the keys."""
    fingerprint: str
    """SHA-256 in hex over key, size and CRC of the images: the same at another path or in another container."""


@dataclass(frozen=True)
class Dataset:
    """The accepted images of a source, numbered from 0."""

    source: Source
    index: Index

    def __len__(self) -> int:
        return len(self.index.items)

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def key(self, i: int) -> str:
        return self.source.key(int(self.index.items[i]))

    def read(self, i: int) -> np.ndarray:
        """(bytes,) uint8, read-only: the file.  Thread-safe.  Raises DataError."""
        return self.source.read(int(self.index.items[i]))

    def size(self, i: int) -> tuple[int, int]:
        """Height and width in pixels, after EXIF rotation."""
        return int(self.index.heights[i]), int(self.index.widths[i])

    def where(self, stays: np.ndarray, found: Sequence[tuple[str, str]] = ()) -> Dataset:
        """The images at which the mask (n,) bool is set; found joins the rejected."""
        index = self.index
        items, crcs = index.items[stays], index.crcs[stays]
        rejected = tuple(sorted([*index.rejected, *found]))
        fingerprint = _fingerprint(self.source, items, crcs)
        return Dataset(
            self.source, Index(items, index.heights[stays], index.widths[stays], crcs, rejected, fingerprint)
        )


def open_dataset(cfg: DataConfig) -> Dataset:
    """The photographs of data.dataroot with their index: the kept one where it still holds, else from a pass over all.

    Raises:
        ConfigError: data.dataroot is empty.
        DataError: the source cannot be opened, a file not be read, no image is left, or one is bad and data.strict set.
        StorageError: the cache folder cannot be made.
    """
    source = open_source(cfg.dataroot)
    kept = index_file(cfg)
    stamp = _stamp(source, cfg)
    index = _load(kept, stamp, len(source))
    if index is None:
        log.info("%s: reading %d files once to index them", shown(source.path), len(source))
        index = build_index(source, cfg.max_pixels)
        _keep(kept, stamp, index)
    if index.rejected:
        if cfg.strict:
            key, reason = index.rejected[0]
            raise DataError(f"{shown(source.path)}: {shown(key)} {reason} (data.strict is set)")
        log.warning("%s", rejected_line(source, index, kept))
    if not len(index.items):
        first = "; ".join(f"{shown(key)} {reason}" for key, reason in index.rejected[:1])
        raise DataError(f"{shown(source.path)}: none of its {len(source)} files is a readable image: {first}")
    return Dataset(source, index)


def build_index(source: Source, max_pixels: int) -> Index:
    """One pass over all files of the source.

    Raises:
        DataError: a file cannot be read at all, which is the machine's failure and not the photograph's.
    """
    examined = _in_threads(lambda item: _examine(source, item, max_pixels), len(source))
    accepted = [(item, *facts) for item, facts in enumerate(examined) if not isinstance(facts, str)]
    rejected = tuple((source.key(item), facts) for item, facts in enumerate(examined) if isinstance(facts, str))
    table = np.array(accepted, np.int64).reshape(-1, 4)
    items, crcs = table[:, 0], table[:, 3].astype(np.uint32)
    return Index(
        items=items,
        heights=table[:, 1].astype(np.int32),
        widths=table[:, 2].astype(np.int32),
        crcs=crcs,
        rejected=rejected,
        fingerprint=_fingerprint(source, items, crcs),
    )


def check_full(dataset: Dataset) -> tuple[tuple[str, str], ...]:
    """Decodes every accepted image with Pillow; key and reason of those that fail.

    A JPEG whose entropy-coded data is damaged inside does not fail: libjpeg, and so every decoder here, paints over it.
    """
    large = threading.Lock()

    def check(i: int) -> str:
        height, width = dataset.size(i)
        with large if height * width > LARGE_PIXELS else contextlib.nullcontext():
            try:
                data = dataset.read(i).tobytes()
                with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
                    opened.load()
                if data.startswith(PNG_SIGNATURE):
                    check_png_content(data)
            except BadImage as error:
                return str(error)
            # Pillow's plugins raise all of these on damaged content.
            except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, zlib.error) as error:
                return f"does not decode ({one_line(error)})"
        return ""

    reasons = _in_threads(check, len(dataset))
    return tuple((dataset.key(i), reason) for i, reason in enumerate(reasons) if reason)


def leave_out(cfg: DataConfig, dataset: Dataset, found: Sequence[tuple[str, str]]) -> Dataset:
    """The dataset without the images that check_full found bad, its index kept in place of the former one."""
    bad = {key for key, _ in found}
    rest = dataset.where(np.array([dataset.key(i) not in bad for i in range(len(dataset))], bool), found)
    _keep(index_file(cfg), _stamp(dataset.source, cfg), rest.index)
    return rest


def cache_path(cache_dir: str) -> Path:
    """data.cache_dir or its default, whether it is there or not.

    Raises:
        RuntimeError: there is no home folder.
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "dcgan-faces"


def cache_folder(cfg: DataConfig) -> Path:
    """data.cache_dir or its default, made where it is missing.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder = cache_path(cfg.cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"data.cache_dir: {shown(folder)} cannot be made ({error.strerror})") from error
    except RuntimeError as error:  # no home folder
        raise StorageError(f"data.cache_dir must be set here: {error}") from error
    return folder


def index_file(cfg: DataConfig) -> Path:
    """Where the index of data.dataroot is kept; rejected.txt lies beside it."""
    path = str(Path(cfg.dataroot).expanduser().absolute())
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).name)[:40]
    return cache_folder(cfg) / "index" / f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}" / "index.npz"


def rejected_line(source: Source, index: Index, kept: Path) -> str:
    """One line: how many files are left out, the first of them, and where all are named."""
    first = ", ".join(f"{shown(key)} {reason}" for key, reason in index.rejected[:3])
    more = f", ...; all are named in {kept.with_name('rejected.txt')}" if len(index.rejected) > 3 else ""
    return f"{shown(source.path)}: {len(index.rejected)} of {len(source)} files are left out: {first}{more}"


def _examine(source: Source, item: int, max_pixels: int) -> tuple[int, int, int] | str:
    """Height, width and CRC-32 of a file, or why it is left out."""
    size = source.size(item)
    if size < 0:
        return "is a link that leads nowhere"
    if size > MAX_FILE_BYTES:
        return f"has {size} bytes, more than {MAX_FILE_BYTES}"
    try:
        content = source.read(item).tobytes()
        crc = zlib.crc32(content)
        claimed = source.checksum(item)
        if claimed is not None and claimed != crc:
            return f"does not match its checksum in {shown(source.path.name)}"
        return *read_size(content, max_pixels), crc
    except BadImage as error:
        return str(error)
    except DamagedMember as error:
        return error.reason


def _in_threads(work: Callable[[int], T], count: int) -> list[T]:
    """work(0) to work(count - 1) in that order; the first exception ends it."""

    def task(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + ITEMS_PER_TASK, count))]

    with ThreadPoolExecutor(THREADS, thread_name_prefix="index") as pool:
        try:
            return [result for part in pool.map(task, range(0, count, ITEMS_PER_TASK)) for result in part]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fingerprint(source: Source, items: np.ndarray, crcs: np.ndarray) -> str:
    digest = hashlib.sha256()
    for item, crc in zip(items.tolist(), crcs.tolist(), strict=True):
        digest.update(source.key(item).encode(errors="surrogateescape"))
        digest.update(struct.pack("<xQI", source.size(item), crc))
    return digest.hexdigest()


def _stamp(source: Source, cfg: DataConfig) -> str:
    return f"{VERSION} {cfg.max_pixels} {source.stamp()}"


def _load(kept: Path, stamp: str, num_files: int) -> Index | None:
    """The kept index, or None where there is none that holds."""
    if not kept.exists():
        return None
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            if meta["stamp"] != stamp:
                return None
            index = Index(
                items=arrays["items"],
                heights=arrays["heights"],
                widths=arrays["widths"],
                crcs=arrays["crcs"],
                rejected=tuple((key, reason) for key, reason in meta["rejected"]),
                fingerprint=meta["fingerprint"],
            )
        if len(index.items) + len(index.rejected) != num_files:
            raise ValueError(f"it speaks of {len(index.items) + len(index.rejected)} files, not {num_files}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s: the kept index is damaged (%s); the files are read again", shown(kept), one_line(error))
        return None
    return index


def _keep(kept: Path, stamp: str, index: Index) -> None:
    """Written aside and renamed, so that another process sees the former index or this one.

    A cache that cannot be written does not stop anyone: the next run reads the files again, and a line says so.
    """
    meta = {"stamp": stamp, "fingerprint": index.fingerprint, "rejected": index.rejected}
    content = io.BytesIO()
    np.savez(
        content,
        items=index.items,
        heights=index.heights,
        widths=index.widths,
        crcs=index.crcs,
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    names = "".join(f"{shown(key)}\t{reason}\n" for key, reason in index.rejected)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        _write(kept.with_name("rejected.txt"), names.encode())
        _write(kept, content.getvalue())
    except OSError as error:
        log.warning(
            "%s: the index cannot be kept (%s); the next run reads all files again", shown(kept), error.strerror
        )


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
