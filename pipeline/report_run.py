"""A run's folder as its report needs it: status, settings, statistics, and pictures small enough to embed."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pipeline.errors import StorageError
from pipeline.files import read_object
from pipeline.pictures import GAP, grid_shape
from pipeline.report_charts import Value, evenly

MOST_FRAMES = 24
FRAMES_BYTES = 1_000_000
"""All frames of the growth together; base64 adds a third."""
STILL_BYTES = 60_000
"""A picture larger than this is compressed before it is embedded."""
FRAME_SETTINGS = ((1056, 86), (528, 80), (528, 50), (264, 30))
"""Longest side in pixels and WebP quality, tried in this order until the frames fit."""
STRIP_ROWS, STRIP_COLUMNS = 8, 3


@dataclass(frozen=True)
class Frame:
    """A picture for the page: images seen when it was made, and its data URI."""

    images_seen: int
    uri: str


@dataclass(frozen=True)
class Made:
    """A picture that the report has made of the run's generator, in RUN/report/, and what belongs to it."""

    facts: dict[str, Any]
    uris: list[str]
    """Data URIs: the picture, or its rows."""

    @property
    def images_seen(self) -> int:
        return int(number(self.facts.get("images_seen")) or 0)


@dataclass
class Run:
    """All that the page shows, as it lies in the run's folder; what is missing is empty."""

    name: str
    status: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    stats: list[dict[str, Any]] = field(default_factory=list)
    """Lines of stats.jsonl."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl: the evaluations while it trained."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The last line of evaluations.jsonl: the newest of launch/evaluate.py."""
    reals: str = ""
    """Data URI of the real photographs."""
    fakes: Frame | None = None
    """The newest grid of the fixed latents."""
    growth: list[Frame] = field(default_factory=list)
    """Grids of the fixed latents, oldest first."""
    strip: list[Frame] = field(default_factory=list)
    """The first few pictures of some of those grids, a row each."""
    samples: Made | None = None
    """Random samples, as a grid."""
    walks: Made | None = None
    """Ways between latents, one a row."""
    neighbours: Made | None = None
    """Samples, each with the photographs nearest to it, one a row."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    def column(self, key: str) -> list[Value]:
        """One number of every line of stats.jsonl; None where it is missing or not finite."""
        return numbers(self.stats, key)

    @property
    def seen(self) -> list[float]:
        """Images seen at each line of stats.jsonl."""
        return positions(self.stats)

    @property
    def config(self) -> dict[str, Any]:
        """The settings as nested texts: BaseLoader leaves 2e-4 and true as they were written."""
        try:
            config = yaml.load(self.config_text, Loader=yaml.BaseLoader)
        except yaml.YAMLError as error:
            return {"config.yaml": f"could not be read: {error}"}
        return config if isinstance(config, dict) else {}

    @property
    def images_seen(self) -> Value:
        seen = number(self.status.get("images_seen"))
        return seen if seen is not None or not self.stats else number(self.stats[-1].get("images_seen"))


def positions(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Images seen at each row of those that were read here, which all have it."""
    return [float(row["images_seen"]) for row in rows]


def numbers(rows: Sequence[dict[str, Any]], key: str) -> list[Value]:
    """One number of every row; None where it is missing or not finite."""
    return [number(row.get(key)) for row in rows]


def check_run(run: Path) -> None:
    """
    Raises:
        StorageError: not a run's folder.
    """
    if not run.is_dir():
        raise StorageError(f"{run} must be the folder of a run, found {'a file' if run.exists() else 'nothing'}")
    if not any((run / name).exists() for name in ("status.json", "config.yaml", "stats.jsonl")):
        raise StorageError(f"{run} holds no run: no status.json, config.yaml or stats.jsonl")


def read_run(run: Path) -> Run:
    """Reads what a run's folder holds so far.

    Raises:
        StorageError: not a run's folder, or a file of it is not what it should be.
    """
    check_run(run)
    result = Run(
        name=run.resolve().name,
        status=_read_json(run / "status.json"),
        env=_read_json(run / "env.json"),
        config_text=_read_text(run / "config.yaml"),
    )
    result.stats = _read_rising(run / "stats.jsonl", result)
    result.metrics = _read_rising(run / "metrics.jsonl", result)
    result.evaluation = _read_last(run / "evaluations.jsonl", result)
    _read_pictures(run / "samples", result)
    result.samples = _read_made(run, "samples", result)
    result.walks = _read_made(run, "walks", result)
    result.neighbours = _read_made(run, "neighbours", result)
    return result


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise StorageError(f"{path} must be JSON, found {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} must be a JSON object, found {type(value).__name__}")
    return value


def _read_rising(path: Path, run: Run) -> list[dict[str, Any]]:
    """Lines with a rising images_seen; a running trainer's last line may be cut short, which is no fault."""
    lines = _read_text(path).splitlines()
    seen, bad = -1.0, 0
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            bad += i + 1 < len(lines)
            continue
        images_seen = number(value.get("images_seen")) if isinstance(value, dict) else None
        if images_seen is None or images_seen <= seen:
            bad += 1
            continue
        seen = images_seen
        rows.append(value)
    if bad:
        run.notes.append(f"{path.name}: {bad} of {len(lines)} lines were unreadable or out of order and are left out")
    return rows


def _read_last(path: Path, run: Run) -> dict[str, Any]:
    """The last line that is an object, empty where there is none; what follows it is told, but for a line cut short."""
    lines = _read_text(path).splitlines()
    for i, line in reversed(list(enumerate(lines))):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            return value
        if i + 1 < len(lines):
            run.notes.append(f"{path.name}: line {i + 1} of {len(lines)} is unreadable and left out")
    return {}


def _read_made(run: Path, name: str, result: Run) -> Made | None:
    """What report_made.py left under this name; None where there is none."""
    facts = read_object(run / "report" / f"{name}.json")
    picture = _open(run / "report" / f"{name}.png", result) if facts else None
    if picture is None:
        return None
    rows = int(number(facts.get("rows")) or 1)
    height = (picture.height + GAP) // rows
    strips = [picture.crop((0, i * height, picture.width, (i + 1) * height - GAP)) for i in range(rows)]
    return Made(facts, [_uri(_webp(strip, 1056, 88), "webp") for strip in strips])


def number(value: object) -> Value:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_pictures(samples: Path, run: Run) -> None:
    """Fills in the real photographs, the newest fakes, their growth, and the strip of single faces."""
    reals = _open(samples / "reals.png", run)
    if reals:
        run.reals = _still(samples / "reals.png", reals)
    grids: list[tuple[int, Path, Image.Image]] = []
    names = (p for p in samples.glob("fakes-*.png") if re.fullmatch(r"fakes-\d+", p.stem))
    found = sorted(names, key=lambda p: int(p.stem.removeprefix("fakes-")))  # names stop sorting at 10^9 images
    for path in (found[i] for i in evenly(len(found), MOST_FRAMES)):
        image = _open(path, run)
        if image:
            grids.append((int(path.stem.removeprefix("fakes-")), path, image))
    if not grids:
        return
    images_seen, path, image = grids[-1]
    run.fakes = Frame(images_seen, _still(path, image))
    encoded = _fitting([image for _, _, image in grids])
    run.growth = [Frame(n, _uri(data, "webp")) for (n, _, _), data in zip(grids, encoded, strict=True)]
    run.strip = _strip([(n, image) for n, _, image in grids], _tile(run.config_text, grids[-1][2].size))


def _open(path: Path, run: Run) -> Image.Image | None:
    """The picture, or None and a note where it is there but cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGBA" if image.mode == "RGBA" else "RGB")
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError) as error:  # Pillow calls a broken PNG chunk a SyntaxError
        run.notes.append(f"{path.name} could not be read: {error}")
        return None


def _still(path: Path, image: Image.Image) -> str:
    """The file as it is where it is small, else a compressed copy."""
    data = path.read_bytes()
    return _uri(data, "png") if len(data) <= STILL_BYTES else _uri(_webp(image, 1056, 90), "webp")


def _fitting(images: Sequence[Image.Image]) -> list[bytes]:
    """The pictures as WebP, in the best of FRAME_SETTINGS that keeps them within FRAMES_BYTES together."""
    for side, quality in FRAME_SETTINGS:
        encoded: list[bytes] = []
        for image in images:
            encoded.append(_webp(image, side, quality))
            if sum(map(len, encoded)) > FRAMES_BYTES:
                break
        else:
            break
    return encoded


def _webp(image: Image.Image, side: int, quality: int) -> bytes:
    shrunk = image
    if max(image.size) > side:
        shrunk = image.copy()
        shrunk.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, format="WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _tile(config_text: str, size: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height of one picture of a grid, from the grid's own size and the config's image_size and grid_size.

    None where they do not fit together (an older run, another grid): the page then leaves the strip out.
    """
    number = re.search(r"^\s*grid_size:\s*(\d+)\s*$", config_text, re.MULTILINE)
    if not number or int(number[1]) < STRIP_COLUMNS:
        return None
    rows, columns = grid_shape(int(number[1]))
    width, left_over = divmod(size[0] + GAP, columns)
    height, over = divmod(size[1] + GAP, rows)
    return None if left_over or over or columns < STRIP_COLUMNS else (width - GAP, height - GAP)


def _strip(grids: Sequence[tuple[int, Image.Image]], tile: tuple[int, int] | None) -> list[Frame]:
    """The first pictures of a grid's first row, at up to 8 moments; empty where there are too few to compare."""
    if tile is None or len(grids) < 3:
        return []
    width = STRIP_COLUMNS * (tile[0] + GAP) - GAP
    chosen = (grids[i] for i in evenly(len(grids), STRIP_ROWS))
    return [Frame(n, _uri(_webp(image.crop((0, 0, width, tile[1])), 528, 88), "webp")) for n, image in chosen]
