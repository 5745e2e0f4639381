"""Measuring G while it trains: what comes of an evaluation, which checkpoint is the best, and when it is enough.

All that is remembered is RUN/metrics.jsonl, a line an evaluation, which is cut back as stats.jsonl is when a run goes
on from a checkpoint.  The best, and how long there has been no better one, are read from it each time: no checkpoint
carries them, and no way back or change of settings can leave them wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache import Cached
from pipeline.checkpoint import best as marked_best
from pipeline.checkpoint import count_of, folder_of, folders
from pipeline.checkpoint_writer import forget_best, mark_best
from pipeline.config import METRICS, Config, EvalConfig, to_dict
from pipeline.decode import Decoder
from pipeline.distributed import Ranks
from pipeline.errors import StorageError
from pipeline.index import Dataset
from pipeline.loop import Maintenance
from pipeline.meters import METRICS_FILE, Log, rows_up_to, write_rows
from pipeline.players import Players
from pipeline.resume import value_of
from pipeline.runfolder import RunFolder
from pipeline.samples import Samples
from pipeline.sampling import recalibrated
from pipeline.showing import average_of

if TYPE_CHECKING:
    from pipeline.metrics.evaluation import Evaluation

_COMPARED = (
    "data.nc", "model.nz", "model.ngf", "model.ndf", "model.spectral_norm", "optim.lr", "optim.lr_d", "optim.beta1",
    "optim.beta2", "optim.lr_decay", "optim.ema_half_life_images", "loss.kind", "loss.real_label",
    "loss.gradient_penalty", "loss.r1", "loss.d_steps", "d_input.augment", "d_input.noise", "train.batch_size",
    "data.flip", "run.seed",
)  # fmt: skip
"""Settings that a table of runs compares, beside image size, precision and ranks."""
_IMAGE_S = 0.5
"""Seconds that no evaluation takes for each of its images, on however slow a machine; one that does hangs."""


def open_evaluation(
    cfg: Config,
    dataset: Dataset,
    ranks: Ranks,
    *,
    decoder: Decoder,
    cached: Cached | None,
    samples: Samples | None = None,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> Evaluation | None:
    """What eval.every_images measures with; None where it is 0.

    Raises:
        ConfigError: fewer photographs than eval.num_images, or a metric that cannot be had here.
        DataError: Inception's weights are missing, or others than they should be.
    """
    if not cfg.eval.every_images:
        return None
    from pipeline.metrics.evaluation import Evaluation  # a run that measures nothing needs none of it

    return Evaluation(
        cfg,
        dataset,
        ranks,
        metrics=cfg.eval.metrics,
        num_images=cfg.eval.num_images,
        decoder=decoder,
        cached=cached,
        samples=samples,
        threads=threads,
        say=say,
    )


def measured(evaluation: Evaluation, players: Players, cfg: Config, images_seen: int) -> dict[str, Any]:
    """A line of metrics.jsonl about G's average, with statistics recalibrated for it; a collective call."""
    begun = time.perf_counter()
    values = evaluation.measure(recalibrated(average_of(players, cfg), cfg.model.nz))
    row = {"images_seen": images_seen, "num_images": cfg.eval.num_images}
    return row | {"seconds": round(time.perf_counter() - begun, 3)} | values


def patience_s(cfg: Config) -> float:
    """Seconds after which an evaluation is taken for one that hangs."""
    return cfg.distributed.start_timeout_s + _IMAGE_S * cfg.eval.num_images


@dataclass(frozen=True)
class Standing:
    """Where a run stands by its evaluations so far."""

    metric: str
    best: dict[str, Any] | None
    """The line of the best one whose checkpoint is there; None: there is none."""
    since: int
    """Evaluations after it: so many in a row without a better one."""

    def told(self) -> str:
        """The best in words."""
        return f"best {self.best[self.metric]:.4g} after {self.best['images_seen']:,} images" if self.best else ""

    def enough(self, patience: int) -> str:
        """Why a run of this patience ends here; empty: it goes on."""
        if not patience or self.best is None or self.since < patience:
            return ""
        return f"no better {self.metric} in {self.since} evaluation(s); {self.told()}"


def standing_of(rows: list[dict[str, Any]], cfg: EvalConfig, saved: set[int]) -> Standing:
    """Where these evaluations leave a run.

    Args:
        rows: lines of metrics.jsonl, oldest first.  Those of other settings, without this metric or of another number
            of images (which most figures depend on), do not compare and count for nothing.
        saved: images seen of the checkpoints that are there.
    """
    sign = 1 if METRICS[cfg.best] == "lower" else -1
    best, since = None, 0
    for row in rows:
        if cfg.best not in row or row.get("num_images") != cfg.num_images:
            continue
        since += 1
        value = row[cfg.best]
        comparable = value is not None and math.isfinite(value) and row["images_seen"] in saved
        if comparable and (best is None or sign * value < sign * best[cfg.best]):
            best, since = row, 0
    return Standing(cfg.best, best, since)


def standing(
    run: Path, cfg: EvalConfig, images_seen: float = math.inf, more: tuple[dict[str, Any], ...] = ()
) -> Standing:
    """Where a run stands by its metrics.jsonl up to so many images, and lines that are not in it yet."""
    rows = rows_up_to(run / METRICS_FILE, images_seen)
    return standing_of([*rows, *more], cfg, {count_of(folder) for folder in folders(run)})


def enough(run: Path, cfg: EvalConfig, images_seen: int) -> str:
    """Why a run that has come so far is over by eval.patience; empty: it is not."""
    return standing(run, cfg, images_seen).enough(cfg.patience) if cfg.every_images else ""


def keep_best(run: Path, found: Standing) -> None:
    """Mark the best checkpoint, so that pruning spares it; a mark whose checkpoint was set aside is taken away.

    Raises:
        StorageError: the disk refused.
    """
    try:
        marked = marked_best(run)
    except StorageError:  # garbled: what it should say stands in metrics.jsonl
        forget_best(run)
        marked = ""
    if found.best is not None:
        folder = folder_of(run, found.best["images_seen"])
        if folder.name != marked:
            mark_best(run, folder)
    elif marked and not (run / "checkpoints" / marked).is_dir():
        forget_best(run)


def recall(cfg: EvalConfig, folder: RunFolder) -> None:
    """Rank 0, when training begins: the best by these settings, and without what came after the checkpoint.

    Raises:
        StorageError: the disk refused.
    """
    path = folder.path / METRICS_FILE
    rows = rows_up_to(path)
    saved = {count_of(folder) for folder in folders(folder.path)}
    found = standing_of(rows, cfg, saved)
    keep_best(folder.path, found)
    called_best = next((row for row in reversed(rows) if row.get("best")), None)
    if called_best is not found.best:  # whose checkpoint is gone, or which other settings chose
        write_rows(path, [row | {"best": row is found.best} for row in rows])
    folder.update(**status_of(rows, found))


def note(row: dict[str, Any], cfg: EvalConfig, folder: RunFolder, log: Log) -> str:
    """Rank 0 writes an evaluation down and marks the best; why the run ends here, if it does.

    Raises:
        StorageError: the disk refused.
    """
    found = standing(folder.path, cfg, more=(row,))
    row["best"] = found.best is row
    keep_best(folder.path, found)
    log.measured(row, curves(row, found), in_words(row, found))
    folder.update(**status_of([row], found))
    return found.enough(cfg.patience)


def in_words(row: dict[str, Any], found: Standing) -> str:
    """An evaluation for a person: each metric, and by which one the best is chosen."""
    words = []
    for name in METRICS:
        if name in row:
            value = "-" if row[name] is None else f"{row[name]:.4g}"
            note = ""
            if name == found.metric:
                note = " (the best so far)" if row["best"] else f" ({found.told()})" if found.best else ""
            words.append(f"{name} {value}{note}")
    return f"metrics: {'  '.join(words)}"


def curves(row: dict[str, Any], found: Standing) -> dict[str, float]:
    """An evaluation as points of TensorBoard's curves, by tag."""
    none = ("images_seen", "num_images", "seconds", "best")
    points = {f"Metrics/{name}": value for name, value in row.items() if name not in none}
    if found.best:
        points[f"Metrics/best_{found.metric}"] = found.best[found.metric]
    return points | {"Timing/evaluation_s": row["seconds"]}


def curve_tags(cfg: EvalConfig) -> list[str]:
    """The tags of the curves that say how good a run is."""
    return [f"Metrics/{name}" for name in (*cfg.metrics, f"best_{cfg.best}")] if cfg.every_images else []


def status_of(rows: list[dict[str, Any]], found: Standing) -> dict[str, Any]:
    """Entries of status.json: the newest evaluation, and the best."""
    best = found.best and {
        "metric": found.metric,
        "value": found.best[found.metric],
        "images_seen": found.best["images_seen"],
    }
    return {"metrics": rows[-1] if rows else None, "best": best}


def due_at(cfg: Config, images_seen: int, total_images: int) -> bool:
    """Whether a run that has come so far has an evaluation there."""
    before = images_seen - cfg.train.batch_size
    entry = Maintenance(cfg.eval.every_images, lambda _seen: None)
    return cfg.eval.every_images > 0 and images_seen > 0 and entry.due(before, images_seen, images_seen >= total_images)


def missing_at(run: Path, cfg: Config, images_seen: int, total_images: int) -> bool:
    """Whether the evaluation that was due at this run's checkpoint of so many images never came to its end."""
    if not due_at(cfg, images_seen, total_images) or not folder_of(run, images_seen).is_dir():
        return False
    return all(row["images_seen"] != images_seen for row in rows_up_to(run / METRICS_FILE))


def plan_in_words(cfg: Config, total_images: int) -> str:
    """For --dry-run: how often is measured what, and what follows."""
    wanted = cfg.eval
    if not wanted.every_images:
        return "none (eval.every_images is 0)"
    crossed = min(total_images // wanted.every_images, total_images // cfg.train.batch_size)
    count = crossed + (
        total_images // wanted.every_images == (total_images - cfg.train.batch_size) // wanted.every_images
    )
    text = (
        f"{count}, every {wanted.every_images:,} images and at the end: {', '.join(wanted.metrics)} of "
        f"{wanted.num_images:,} images; the best by {wanted.best} is kept"
    )
    return text + (f", {wanted.patience} without a better one end the run" if wanted.patience else "")


def compared_settings(cfg: Config, **more: Any) -> dict[str, Any]:
    """The main settings of a run as numbers, texts and truth values, for a table of runs.

    Args:
        more: what every `auto` came to.
    """
    found = {key: value_of(to_dict(cfg), key) for key in _COMPARED} | more
    found["data.image_size"] = "x".join(map(str, cfg.data.size))
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in found.items()}
