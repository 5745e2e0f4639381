"""Further arms of benchmarks.train: what feeds our step in the usual way, and programs that are not ours at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import harness
from benchmarks.arms import plan_of
from benchmarks.plain_loop import EndlessShuffle
from pipeline import precision
from pipeline.assembly import Plan, build_step
from pipeline.config import Config
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.index import Dataset as Photographs
from pipeline.philox import Stream
from pipeline.sampling import latents


class Pixels(Dataset[Tensor]):
    """Files as (S, S, 3) uint8, read by Pillow, resized and cropped by torchvision."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = list(paths)
        self.cut = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> Tensor:
        with Image.open(self.paths[item]) as image:
            return torch.from_numpy(np.array(self.cut(image.convert("RGB"))))


class LoaderArm:
    """Our step on what a DataLoader with Pillow gives it, without cache and without looking after the run.

    The workers start when it is made, the networks with build(): workers are best forked before other threads exist.

    Args:
        workers: processes that read.
    """

    plan: Plan

    def __init__(self, cfg: Config, paths: Sequence[Path], device: torch.device, workers: int) -> None:
        data = dataclasses.replace(cfg.data, cache="none", decoder="pillow")
        self.cfg, self.device, self.workers = dataclasses.replace(cfg, data=data), device, workers
        loader = DataLoader(
            Pixels(paths, cfg.data.size[0]),
            batch_size=cfg.train.batch_size,
            sampler=EndlessShuffle(len(paths)),
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        self._batches: Iterator[Tensor] = iter(loader)
        self.images_seen, self.wait_s = 0, 0.0

    def build(self, dataset: Photographs, ranks: Ranks) -> None:
        """The networks and their step."""
        self.plan = plan_of(self.cfg, dataset, ranks)
        precision.apply(self.plan.precision, deterministic=self.cfg.run.deterministic)
        self.step = build_step(self.cfg, self.plan, ranks)

    def run(self, steps: int) -> float:
        """Train for so many steps on the next photographs; the seconds taken."""
        precision.apply(self.plan.precision, deterministic=self.cfg.run.deterministic)
        batch, nz = self.cfg.train.batch_size, self.cfg.model.nz
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            images = next(self._batches)
            self.wait_s += time.perf_counter() - asked
            vectors = latents(self.cfg.run.seed, Stream.LATENT, self.images_seen, batch, nz, self.device)
            self.step(images.to(self.device, non_blocking=True), vectors, self.images_seen, batch)
            self.images_seen += batch
        harness.wait_for(self.device)
        return time.perf_counter() - start

    def close(self) -> None:
        """End the worker processes.  May be called twice."""
        self._batches = iter(())  # the loader's iterator ends and joins them as it goes


class PeerArm:
    """A program of somebody else's that prints a line an iteration, stopped (SIGSTOP) while others have their turn.

    Its output goes to a terminal of its own, so that lines come when they are printed and not by the buffer.  Stopped
    are all processes of its group: workers that put themselves into another one work on.

    Args:
        command: as for a shell, but run without one.
        pattern: a regular expression; lines without a match do not count as an iteration.

    Raises:
        UserError: there is no such program.
    """

    wait_s = 0.0
    """What it waits for cannot be seen from outside."""

    def __init__(self, command: str, *, pattern: str = "", patience_s: float = 300.0) -> None:
        self.command, self.pattern, self.patience_s = command, re.compile(pattern), patience_s
        self._lines, self._last, self._ended = 0, deque[str](maxlen=1), False
        self._arrived = 0.0
        """When the last line that counts came."""
        self._changed = threading.Condition()
        self._closed = False
        ours, its = pty.openpty()
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.DEVNULL, stdout=its, stderr=its, start_new_session=True
            )
        except OSError as error:
            os.close(ours)
            raise UserError(f"--peer cannot be started: {command} ({error.strerror})") from error
        finally:
            os.close(its)
        self._signal(signal.SIGSTOP)  # until its first turn
        self._thread = threading.Thread(target=self._read, args=(ours,), name="peer", daemon=True)
        self._thread.start()

    def _read(self, terminal: int) -> None:
        rest = b""
        with contextlib.suppress(OSError):  # what a terminal's end reads as, once nobody holds the other
            while chunk := os.read(terminal, 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                now = time.perf_counter()
                texts = [line.decode(errors="replace").strip() for line in lines]
                with self._changed:
                    self._last.extend(text for text in texts if text)
                    new = sum(1 for text in texts if text and self.pattern.search(text))
                    if new:
                        self._lines, self._arrived = self._lines + new, now
                    self._changed.notify_all()
        os.close(terminal)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def run(self, steps: int) -> float:
        """Let it go on for so many lines; the seconds until the last of them came.

        Raises:
            UserError: it ended, or printed too little for too long.
        """
        with self._changed:
            wanted = self._lines + steps
            start = time.perf_counter()
            self._signal(signal.SIGCONT)
            while self._lines < wanted and not self._ended:
                if not self._changed.wait(self.patience_s):
                    raise UserError(f"--peer printed no line in {self.patience_s:g} s: {self.command}")
            if self._lines < wanted:
                last = self._last[0] if self._last else "no output"
                raise UserError(f"--peer ended after {self._lines} lines, too few for its blocks; its last: {last}")
            self._signal(signal.SIGSTOP)
            # Lines that came in one piece with the last one wanted are steps as well.
            return (self._arrived - start) * steps / (self._lines - wanted + steps)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it and its group.  May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        self._signal(signal.SIGKILL)  # what is left of its group
        self._thread.join(5)  # longer only where a process that left the group holds the terminal
