"""What training says while it runs: stats.jsonl, metrics.jsonl, TensorBoard, W&B, a progress bar or plain lines.

Losses add up on the device and are read every log.every_steps steps, the only place where the host waits for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from pipeline.errors import StorageError
from pipeline.feed import Feed
from pipeline.files import written_aside
from pipeline.step import METERS
from pipeline.tracker import Tracker

METRICS_FILE = "metrics.jsonl"
"""In a run's folder: a line for each evaluation while it trained."""
_TAGS = {
    "loss_d": "Loss/D",
    "loss_g": "Loss/G",
    "penalty_d": "Loss/D_penalty",
    "d_real": "D(x)",
    "d_fake_before": "D(G(z))/before",
    "d_fake_after": "D(G(z))/after",
    "diversity": "Progress/diversity",
    "skipped_steps": "Progress/skipped_steps",
    "epoch": "Progress/epoch",
    "images_seen": "Progress/images",
    "learning_rate": "Progress/learning_rate",
    "learning_rate_d": "Progress/learning_rate_d",
    "images_per_s": "Timing/images_per_s",
    "images_per_s_rank": "Timing/images_per_s_rank",
    "step_ms": "Timing/step_ms",
    "data_wait_percent": "Timing/data_wait_percent",
    "memory_gib": "Resources/memory_gib",
    "tflop_per_s": "Resources/tflop_per_s",
    "peak_fraction": "Resources/fraction_of_measured_peak",
}
# The same three once more: TensorBoard 2.21's custom charts stay empty for tags with parentheses (2026-11).
_CHART_TAGS = {
    "d_real": "Probability/real",
    "d_fake_before": "Probability/fake_before",
    "d_fake_after": "Probability/fake_after",
}
_CHARTS = {
    "DCGAN": {
        "Losses": ["Multiline", ["Loss/D", "Loss/G"]],
        "D(x), D(G(z)) before and after": ["Multiline", list(_CHART_TAGS.values())],
    }
}


def memory_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: on the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def measured_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product in this type, here and now: what the step can be held against."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = math.inf
    for _ in range(6):  # the first ones warm up
        start = time.perf_counter()
        (a @ a).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    if device.type == "cuda":
        del a
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / best / 1e12


class Meters:
    """Sums of what each step measured, on the device; steps whose losses are not finite count apart."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.world_size = world_size
        self.device = device
        # METERS, then what D paid for its slope and in how many steps, steps with finite losses, steps that left an
        # update out.
        self.sums = torch.zeros(len(METERS) + 4, device=device)
        self.steps = 0

    def add(self, measured: Tensor, skipped: Tensor | None = None, penalty: Tensor | None = None) -> None:
        """Add one step's (7,) METERS, its (2,) 0 or 1 for the updates left out, and (2,) what D's penalties came to and
        whether they were due."""
        finite = torch.isfinite(measured).all()
        self.sums[: len(METERS)] += torch.where(finite, measured, 0.0)
        if penalty is not None:
            self.sums[len(METERS) : len(METERS) + 2] += torch.where(
                finite & torch.isfinite(penalty).all(), penalty, 0.0
            )
        self.sums[-2] += finite
        if skipped is not None:
            self.sums[-1] += skipped.max()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What has been added since the last read, so that a resumed run logs the same means."""
        return {"sums": self.sums.to("cpu", copy=True), "steps": self.steps}

    def restore(self, states: list[dict[str, Any]], rank: int) -> None:
        """Put back the state of every rank; at another world size each rank gets the mean."""
        if any(len(s["sums"]) != len(self.sums) for s in states):  # of an older version: the row begins here
            return
        same = len(states) == self.world_size
        self.sums.copy_(states[rank]["sums"] if same else torch.stack([s["sums"] for s in states]).mean(0))
        self.steps = int(states[0]["steps"])

    def read(self, rank: int = 0, own_ms: float = 0.0) -> tuple[dict[str, float], list[float]]:
        """Means over the steps since the last read and over all ranks, and everyone's own_ms; a collective call.

        Returns:
            METERS by name, NaN where no step was finite; `skipped_steps`, `diversity` (how far G's images lie apart, as
            a share of the real ones'), `penalty_d` over the steps in which D paid one, if there were any.  Then own_ms
            in rank order.
        """
        everyone = torch.zeros(self.world_size, device=self.device)
        everyone[rank] = own_ms
        sums = torch.cat([self.sums, everyone])
        if self.world_size > 1:
            dist.all_reduce(sums)
        *totals, penalty, penalised, finite, skipped = sums[: len(self.sums)].tolist()
        means = {k: total / finite if finite else math.nan for k, total in zip(METERS, totals, strict=True)}
        means["diversity"] = means["spread_fake"] / means["spread_real"] if means["spread_real"] else math.nan
        means["skipped_steps"] = round(skipped / self.world_size)
        if penalised:
            means["penalty_d"] = penalty / penalised
        self.sums.zero_()
        self.steps = 0
        return means, sums[len(self.sums) :].tolist()


class Timing:
    """Images a second and the share of the time that the step waited for data, between two log lines."""

    def __init__(self, feed: Feed, elapsed_before: float) -> None:
        self.feed, self.elapsed_before = feed, elapsed_before
        self.started = self.last = time.perf_counter()
        self.waited = feed.wait_s

    def elapsed_s(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def read(self, images: int, world_size: int) -> dict[str, float]:
        """Rates since the last call, for that many global images."""
        now, waited = time.perf_counter(), self.feed.wait_s
        seconds = max(now - self.last, 1e-9)
        rates = {
            "images_per_s": images / seconds,
            "images_per_s_rank": images / world_size / seconds,
            "data_wait_percent": 100 * (waited - self.waited) / seconds,
            "elapsed_s": self.elapsed_s(),
        }
        self.last, self.waited = now, waited
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is no training: it lowers no rate, though elapsed_s() counts it."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.last += time.perf_counter() - begun


def rows_up_to(path: Path, images_seen: float = math.inf) -> list[dict[str, Any]]:
    """The lines of stats.jsonl or metrics.jsonl up to a checkpoint; none where there is no such file."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if row["images_seen"] > images_seen:
                break
        except (ValueError, KeyError, TypeError):  # the last line of a killed run may be half written
            break
        found.append(row)
    return found


def keep_lines_up_to(path: Path, images_seen: int) -> None:
    """Cut from such a file what came after a checkpoint, so that a resumed run does not stand twice in it."""
    if path.exists():
        write_rows(path, rows_up_to(path, images_seen))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Such a file anew.

    Raises:
        StorageError: the disk refused; the former one stays.
    """
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _append(path: Path, row: dict[str, Any]) -> None:
    """A line more, null for numbers that JSON has not.

    Raises:
        StorageError: the disk refused.
    """
    finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in row.items()}
    try:
        with path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


@dataclass
class Progress:
    """Where a run stands."""

    images_seen: int
    total_images: int
    num_images: int
    """Length of the dataset."""


class Log:
    """Rank 0's voice.  On the other ranks there is none."""

    def __init__(
        self, run: Path, progress: Progress, stream: TextIO | None = None, tracker: Tracker | None = None
    ) -> None:
        self.stream = stream or sys.stderr
        self.tracker = tracker
        self.path = run / "stats.jsonl"
        self.metrics_path = run / METRICS_FILE
        self.resumed_at = progress.images_seen
        for path in (self.path, self.metrics_path):
            keep_lines_up_to(path, progress.images_seen)
        # What an earlier start wrote after this point is taken back; without one there is nothing to take back.
        again = (run / "tensorboard").exists()
        with self._board_writes():
            self.board = SummaryWriter(
                str(run / "tensorboard"),
                purge_step=progress.images_seen + bool(progress.images_seen) if again else None,
            )
            self.board.add_custom_scalars(_CHARTS)
        self.bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self.bar = tqdm(
                total=progress.total_images,
                initial=progress.images_seen,
                unit=" images",
                file=self.stream,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    @contextlib.contextmanager
    def _board_writes(self) -> Iterator[None]:
        """
        Raises:
            StorageError: the disk refused, as TensorBoard's own thread has met it.
        """
        try:
            yield
        except OSError as error:
            folder = self.path.with_name("tensorboard")
            raise StorageError(f"cannot write {folder}: {error.strerror or error}") from None

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def advance(self, images: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(images)

    def write(self, row: dict[str, Any], progress: Progress) -> None:
        """One line of stats.jsonl, one point of each curve, and for a person the same in short."""
        _append(self.path, row)
        self._points({tag: row[key] for key, tag in _TAGS.items() if key in row}, row["images_seen"])
        with self._board_writes():
            for key, tag in _CHART_TAGS.items():
                if math.isfinite(row[key]):
                    self.board.add_scalar(tag, row[key], row["images_seen"])
            self.board.flush()
        short = (
            f"Loss_D {row['loss_d']:.3f}  Loss_G {row['loss_g']:.3f}  D(x) {row['d_real']:.2f}"
            f"  D(G(z)) {row['d_fake_before']:.2f}/{row['d_fake_after']:.2f}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(short)
            return
        left = (progress.total_images - row["images_seen"]) / max(row["images_per_s"], 1e-9)
        done = f"{row['images_seen']:>{len(str(progress.total_images))}}/{progress.total_images}"
        minutes, seconds = divmod(round(left), 60)
        self.say(
            f"images {done}  epoch {row['epoch']:.2f}  {short}  {row['images_per_s']:.0f} images/s"
            f"  data wait {row['data_wait_percent']:.1f} %  ETA {minutes}:{seconds:02d}"
        )

    def _points(self, values: dict[str, float], images_seen: int) -> None:
        """A point of each curve, for TensorBoard and for W&B; a gap where the value is not finite."""
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        with self._board_writes():
            for tag, value in finite.items():
                self.board.add_scalar(tag, value, images_seen)
            self.board.flush()
        if self.tracker is not None:
            self.tracker.log(finite, images_seen)
            for news in self.tracker.news():
                self.say(news)

    def measured(self, row: dict[str, Any], curves: dict[str, float], text: str) -> None:
        """One line of metrics.jsonl, a point of each of these curves by their tags, and a line for a person."""
        _append(self.metrics_path, row)
        self._points(curves, row["images_seen"])
        self.say(text)

    def compare(self, settings: dict[str, Any], tags: list[str]) -> None:
        """What TensorBoard's table of runs (HParams) shows of this one.

        Args:
            settings: numbers, texts and truth values.
            tags: of curves, whose last points are shown.
        """
        with self._board_writes():
            assert self.board.file_writer is not None
            # As add_hparams does, but in this folder: a folder of its own would be another run in every chart.
            for part in hparams(settings, dict.fromkeys(tags, 0.0)):
                self.board.file_writer.add_summary(part)
            self.board.flush()

    def event(self, text: str, images_seen: int) -> None:
        """Something that a person should know: a line, and a text in TensorBoard."""
        self.say(text)
        with self._board_writes():
            self.board.add_text("Events", text, images_seen)
            self.board.flush()
        if self.tracker is not None:
            self.tracker.event(text, images_seen)

    def table(self, tag: str, text: str, images_seen: int) -> None:
        """Lines for TensorBoard alone, in columns."""
        with self._board_writes():
            self.board.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), images_seen)
            self.board.flush()

    def picture(self, tag: str, picture: Image.Image, images_seen: int) -> None:
        """Show a picture in TensorBoard."""
        with self._board_writes():
            self.board.add_image(tag, pil_to_tensor(picture), images_seen)
            self.board.flush()
        if self.tracker is not None:
            self.tracker.picture(tag, picture, images_seen)

    def close(self) -> None:
        """End the bar, the event file and the tracker."""
        for news in self.tracker.close() if self.tracker is not None else ():
            self.say(news)
        if self.bar is not None:
            self.bar.close()
        try:
            self.board.close()
        except OSError as error:  # all else is there, and nothing may hide why training has ended
            self.say(f"cannot write the last of {self.path.with_name('tensorboard')}: {error.strerror or error}")
