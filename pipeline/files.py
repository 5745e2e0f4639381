"""Files that are there whole or not at all.  Free of torch, for programs that must start at once."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError


def where_it_may_be(path: Path) -> str:
    """What to add where a user's path leads to nothing: the nearest name beside it, or from where it was looked for."""
    with contextlib.suppress(OSError):
        names = [each.name for each in path.parent.iterdir()]
        if near := difflib.get_close_matches(path.name, names, n=1, cutoff=0.7):
            return f"; did you mean {path.parent / near[0]}?"
    return "" if path.is_absolute() else f" in {Path.cwd()}"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name when the block ends well, and is removed when it does not.

    Raises:
        StorageError: the disk refused, with the reason.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)  # noqa: PTH105 - an older file may be there
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # what was written is gone already, or the disk has refused before
            aside.unlink()


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill; when the block ends well it takes the place of what is there, and is removed
    when it does not.

    Raises:
        StorageError: the disk refused, with the reason.
    """
    aside, former = (folder.with_name(f".{folder.name}.{word}{os.getpid()}") for word in ("", "former."))
    try:
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rename(former)
        aside.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_in_place_if_full(path: Path, text: str) -> None:
    """A small text, whole; on a full disk over the former one, in the blocks that it has already.

    Raises:
        StorageError: the disk refused, and there is no former one with room for it.
    """
    try:
        with written_aside(path) as aside:
            aside.write_text(text)
    except StorageError:
        if not path.exists() or len(text) > path.stat().st_blocks * 512:
            raise
        with path.open("r+") as file:
            file.write(text)
            file.truncate()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read, such as one that a crash cut short."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    return {}


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none where there is no file, nor of lines that a crash cut short."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]
