"""The set of cartoon faces that `make train` draws when it is given no photographs: JPEG files in a folder."""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.faces import DRAWING_VERSION, FILE, draw_face, uniforms

RECIPE_FILE = "faces.json"


def write_faces(
    folder: Path | str,
    count: int,
    seed: int = 0,
    *,
    quality: tuple[int, int] = (80, 95),
    workers: int | None = None,
) -> None:
    """Makes `folder` hold faces 0 to count - 1 as 000000.jpg, 000001.jpg, ..., as mixed as photographs are.

    Four in five measure 178 x 218, as CelebA's do; the others have other sizes and may be wider than high.  About 4 %
    are progressive, 0.7 % grayscale.  The same set, once complete, is recognised by its faces.json and kept.  A set is
    drawn aside and renamed, so that an interrupted run leaves no half of one.

    Args:
        folder: absent, empty, or holding this very set.
        count: at least 1.
        quality: lowest and highest JPEG quality, each 1 to 100.
        workers: processes that draw; by default the CPUs that this process may use, at most 16.  With more than one,
            each imports the caller's script anew, which therefore needs its `if __name__ == "__main__"`.

    Raises:
        ConfigError: a bad argument, or the folder holds anything else.
    """
    folder = Path(folder)
    low, high = quality
    if count < 1:
        raise ConfigError(f"the number of faces must be at least 1, got {count}")
    if not 1 <= low <= high <= 100:
        raise ConfigError(f"quality must be two increasing numbers from 1 to 100, got {quality}")
    recipe = {"count": count, "seed": seed, "quality": [low, high], "version": DRAWING_VERSION}
    if _holds(folder, recipe):
        return
    if workers is None:
        # Starting a process costs about as much as drawing 50 faces.
        workers = max(1, min(_available_cpus(), 16, count // 100))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    aside.mkdir()
    try:
        write = functools.partial(_write_face, aside, seed, (low, high))
        if workers == 1:
            list(map(write, range(count)))
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                list(pool.map(write, range(count), chunksize=32))
        (aside / RECIPE_FILE).write_text(json.dumps(recipe) + "\n")
        try:
            aside.rename(folder)
        except OSError:
            # Another process may have finished the same set meanwhile; anything else there is refused.
            if not _holds(folder, recipe):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _holds(folder: Path, recipe: dict[str, object]) -> bool:
    """Whether the folder is this set, complete; False if there is nothing yet.

    Raises:
        ConfigError: it holds anything else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ConfigError(f"{folder}: faces are written into a folder, and this is a file")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return False
    if RECIPE_FILE not in names:
        raise ConfigError(f"{folder}: faces are written into a new folder, and this one holds other files")
    try:
        found = json.loads((folder / RECIPE_FILE).read_text())
    except ValueError:
        found = None
    if found != recipe:
        is_there = _in_words(found) if isinstance(found, dict) else f"an unreadable {RECIPE_FILE}"
        raise ConfigError(
            f"{folder}: holds another set of faces ({is_there}) than was asked for ({_in_words(recipe)}); "
            "name another folder, or remove this one"
        )
    missing = [name for name in map(_file_name, range(int(str(recipe["count"])))) if name not in names]
    if missing:
        raise ConfigError(f"{folder}: {len(missing)} faces are missing, the first is {missing[0]}; remove the folder")
    return True


def _in_words(recipe: dict[str, object]) -> str:
    low_to_high = recipe.get("quality")
    drawing = f"quality {low_to_high}, drawing {recipe.get('version')}"
    return f"{recipe.get('count')} faces of seed {recipe.get('seed')}, {drawing}"


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"


def _write_face(folder: Path, seed: int, quality: tuple[int, int], number: int) -> None:
    unusual, across, aspect, gray, progressive, level = itertools.islice(uniforms(seed, number, FILE), 6)
    size = (178, 218)
    if unusual < 0.2:
        width = 160 + int(81 * across)
        size = (width, int(width * (0.8 + 0.5 * aspect)))
    picture = draw_face(seed, number, size).convert("L" if gray < 0.007 else "RGB")
    low, high = quality
    level = low + int((high - low + 1) * level)
    picture.save(folder / _file_name(number), quality=level, progressive=progressive < 0.04)
