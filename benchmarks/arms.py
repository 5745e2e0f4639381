"""The arms of benchmarks.train: each does a number of steps when told to, and takes turns with the others."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Protocol

from benchmarks import harness
from pipeline import garbage, precision, resume
from pipeline.assembly import Plan, build_step, make_plan
from pipeline.cache import build_cache
from pipeline.candidates import settle
from pipeline.checkpoint import buffers_of
from pipeline.checkpoint_writer import Snapshots, Writer
from pipeline.choices import Choices
from pipeline.cli.options import to_yaml
from pipeline.config import Config
from pipeline.distributed import Ranks, num_threads
from pipeline.feed import open_feed
from pipeline.index import Dataset, cache_folder
from pipeline.loop import Maintenance, train
from pipeline.meters import Log, Meters, Progress, Timing
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.sampling import latents
from pipeline.vote import Vote
from pipeline.watch import CollapseWatch, HangWatch, OwnTime, SkipWatch, slow_ranks


def plan_of(cfg: Config, dataset: Dataset, ranks: Ranks) -> Plan:
    """What the settings come to here, with the implementations that a run would choose.

    Where this machine has not measured them yet, it does so now.

    Raises:
        ConfigError: this machine cannot do what a setting asks for.
    """
    choices = Choices(ranks.device, cache=cache_folder(cfg.data), overrides=cfg.kernels.choices, say=harness.say)
    plan = make_plan(cfg, dataset, ranks)
    precision.apply(plan.precision, deterministic=cfg.run.deterministic)
    return settle(cfg, plan, ranks, choices)


def implementations(plan: Plan) -> dict[str, str]:
    """Of the operations that have several, for a result line."""
    return {
        "networks": plan.networks,
        "batchnorm": plan.batchnorm,
        "image_ends": plan.image_ends,
        "gather": plan.gather,
    }


class Arm(Protocol):
    """One side of a comparison."""

    @property
    def wait_s(self) -> float:
        """Seconds it has waited for data so far."""
        ...

    def run(self, steps: int) -> float:
        """Do so many steps; the seconds taken."""
        ...

    def close(self) -> None:
        """End its threads and processes."""
        ...


class TrainerArm:
    """The trainer, in blocks of steps: what pipeline.attempt puts together, without pictures.

    Args:
        watched: with the vote at every step, the finite check and the watchdogs, as every run has them.
        saving: with one checkpoint at the middle of each block, written in the background as in a run.
    """

    def __init__(
        self, cfg: Config, dataset: Dataset, ranks: Ranks, folder: Path, *, watched: bool = True, saving: bool = False
    ) -> None:
        if not watched:
            cfg = dataclasses.replace(cfg, watch=dataclasses.replace(cfg.watch, skip_non_finite=False))
        self.cfg, self.device = cfg, ranks.device
        self.plan: Plan = plan_of(cfg, dataset, ranks)
        precision.apply(self.plan.precision, deterministic=cfg.run.deterministic)
        self.step = build_step(cfg, self.plan, ranks)
        self.shard = Slice(cfg.train.batch_size)
        self.images_seen = 0
        threads = cfg.data.workers or num_threads(cfg.distributed, 1)
        cached = None
        if self.plan.cache != "none":
            cached = build_cache(
                cfg.data, dataset, decoder=self.plan.decoder, kind=self.plan.cache, device=ranks.device, threads=threads
            )
        self.feed = open_feed(
            cfg.data, dataset, seed=cfg.run.seed, shard=self.shard, device=ranks.device, images_seen=0, threads=threads,
            decoder=self.plan.decoder, cached=cached,
            normalised=None if self.plan.gather == "torch" else precision.dtype_of(self.plan.precision),
        )  # fmt: skip
        folder.mkdir()
        self.meters = Meters(ranks.device, 1)
        self.progress = Progress(0, self.plan.total_images, len(dataset))
        self.log = Log(folder, self.progress, io.StringIO())
        self.timing = Timing(self.feed, 0.0)
        batch = cfg.train.batch_size
        self.maintenance = [
            Maintenance(cfg.log.every_steps * batch, self._log_row),
            Maintenance(garbage.EVERY_STEPS * batch, garbage.collect),
        ]
        self.watched = watched
        self.own_time = OwnTime(ranks.device)
        self.hang = HangWatch(cfg.watch.hang_s if watched else 0, folder, 0, lambda _reason: None)
        if watched:
            self.vote = Vote(ranks.device, 1)
            self.skips, self.collapse = SkipWatch(cfg.watch.max_skipped_steps), CollapseWatch(cfg.watch)
            self.step.before_backward = self.own_time.end
            self.maintenance.insert(0, Maintenance(batch, self._vote))
            self.maintenance.append(Maintenance(batch, lambda _seen: self.own_time.begin()))
        self.stall_ms: list[float] = []
        """How long each checkpoint held up the loop."""
        self.writer = Writer(folder, 1, []) if saving else None
        if saving:
            self.snapshots = Snapshots(self.step.players)
            self.maintenance.append(Maintenance(batch, self._save))
        self.save_at = -1

    @property
    def wait_s(self) -> float:
        return self.feed.wait_s

    def _vote(self, seen: int) -> None:
        self.hang.beat()
        before = self.vote.tally()
        self.vote.cast(seen, "", self.step.hopeless, 0)
        if before:
            self.skips.look(before.hopeless, seen)

    def _save(self, seen: int) -> None:
        if seen != self.save_at:
            return
        assert self.writer is not None
        harness.wait_for(self.device)  # the step's own time is not the checkpoint's
        start = time.perf_counter()
        self.writer.wait()
        mine = [buffers_of(self.step.players)], [self.meters.state()]
        manifest = {"images_seen": seen, "identity": resume.identity(self.cfg, "benchmark")}
        self.writer.save(self.snapshots.take(mine[0]) | {"meters": mine[1]}, to_yaml(self.cfg), manifest)
        self.stall_ms.append(1e3 * (time.perf_counter() - start))

    def _log_row(self, seen: int) -> None:
        images = seen - self.progress.images_seen
        row = {"images_seen": seen, "epoch": seen / self.progress.num_images}
        means, own_ms = self.meters.read(0, self.own_time.read())
        row |= means | self.timing.read(images, 1)
        self.progress.images_seen = seen
        self.log.write(row, self.progress)
        if self.watched:
            self.collapse.look(row, images)
            slow_ranks(own_ms, 0.0, self.cfg.watch.slow_rank_ratio)

    def run(self, steps: int) -> float:
        """The next steps of one long run.  A log line comes every log.every_steps and at the end of each block."""
        precision.apply(self.plan.precision, deterministic=self.cfg.run.deterministic)
        self.save_at = self.images_seen + (steps + 1) // 2 * self.cfg.train.batch_size
        with garbage.collected_between_steps():
            return self._timed(steps)

    def _timed(self, steps: int) -> float:
        start = time.perf_counter()
        self.images_seen = train(
            self.step,
            self.feed,
            self.meters,
            self.maintenance,
            seed=self.cfg.run.seed,
            shard=self.shard,
            nz=self.cfg.model.nz,
            images_seen=self.images_seen,
            num_steps=self.images_seen // self.cfg.train.batch_size + steps,
            on_step=lambda _seen: self.log.advance(self.cfg.train.batch_size),
        )
        if self.writer is not None:
            self.writer.wait()  # a block pays for its own checkpoint
        harness.wait_for(self.device)
        return time.perf_counter() - start

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.hang.close()
        self.feed.close()
        self.log.close()


class BareStep:
    """The step of a trainer that is already there, on what lies in memory."""

    wait_s = 0.0

    def __init__(self, trainer: TrainerArm) -> None:
        # The trainer's own networks: trained on one batch alone, others would soon compute with other magnitudes.
        self.trainer = trainer
        self.images = trainer.feed.next().clone()
        count, nz = len(self.images), trainer.cfg.model.nz
        self.latents = latents(trainer.cfg.run.seed, Stream.LATENT, 0, count, nz, trainer.device)

    def run(self, steps: int) -> float:
        trainer = self.trainer
        precision.apply(trainer.plan.precision, deterministic=trainer.cfg.run.deterministic)
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step(self.images, self.latents, trainer.images_seen, trainer.cfg.train.batch_size)
        harness.wait_for(trainer.device)
        return time.perf_counter() - start

    def close(self) -> None:
        pass
