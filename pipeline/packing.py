"""Many files into one zip that training reads in place: stored, sorted, the same bytes from the same files."""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.errors import DataError, StorageError
from pipeline.index import Dataset
from pipeline.sources import member_key, shown

DATE = (1980, 1, 1, 0, 0, 0)
"""Of every member: the earliest a zip can say."""


def pack(dataset: Dataset, out: Path, *, force: bool = False) -> tuple[tuple[str, str], ...]:
    """A stored zip of the accepted images, their bytes and keys as they are; its fingerprint is the dataset's.

    Returns:
        Key and reason of each file left out: the rejected ones, and names that a zip cannot hold.

    Raises:
        ConfigError, DataError, StorageError: as write_zip, and DataError where a file cannot be read any more.
    """
    unfit = {key for key in map(dataset.key, range(len(dataset))) if not _fits(key)}
    files = ((dataset.key(i), dataset.read(i).tobytes()) for i in range(len(dataset)) if dataset.key(i) not in unfit)
    write_zip(files, out, force=force)
    return tuple(sorted([*dataset.index.rejected, *((key, "has a name that a zip cannot hold") for key in unfit)]))


def write_zip(files: Iterable[tuple[str, bytes]], out: Path, *, force: bool = False) -> int:
    """A stored zip of the files in the order given, written aside and renamed; the number of its members.

    Raises:
        ConfigError: out exists and force is not set, or has no .zip ending.
        DataError: there are no files.
        StorageError: it cannot be written; nothing of it is left.
    """
    check_target(out, force=force)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for key, content in files:
                    member = zipfile.ZipInfo(key, DATE)
                    member.create_system = 3  # Unix, whatever this machine is, for equal bytes
                    member.external_attr = 0o644 << 16
                    archive.writestr(member, content)
                count = len(archive.filelist)
            if not count:
                raise DataError(f"{shown(out)}: not written, as there is no image to put into it")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    except OSError as error:
        raise StorageError(f"{shown(out)}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return count


def check_target(out: Path, *, force: bool) -> None:
    """Refuses at once what would only be refused after the work. Raises ConfigError."""
    if out.suffix.lower() != ".zip":
        raise ConfigError(f"OUT must end in .zip, got {shown(out)}")
    if out.is_dir() or (out.exists() and not force):
        raise ConfigError(f"OUT must not exist unless --force is given, got {shown(out)}")


def _fits(key: str) -> bool:
    """Whether the key would come back from a zip as it is."""
    try:
        key.encode()
        return member_key(key, Path()) == key
    except (UnicodeEncodeError, DataError):
        return False
