"""A run from its settings to its report: puts the rooms of the pipeline together and walks through the loop.

ranks -> dataset -> cache -> networks -> checkpoint -> feed -> loop -> report
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint as checkpoints
from pipeline import distributed, precision, resume
from pipeline.assembly import Plan, build_step, make_plan, wrap_players
from pipeline.cache import Cached, build_cache
from pipeline.config import Config, ConfigError
from pipeline.distributed import Ranks
from pipeline.errors import DataError, OtherDataError, UserError
from pipeline.feed import Feed, open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.loop import Maintenance, train
from pipeline.meters import Log, Meters, Progress, Timing, measured_peak_tflops, memory_gib
from pipeline.models import Generator, step_flops
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.pictures import grid, save_png
from pipeline.report import write_report
from pipeline.runfolder import RunFolder
from pipeline.sampling import generate, latents, recalibrated
from pipeline.step import Players, Step


class Run:
    """One rank's part of a run."""

    def __init__(self, cfg: Config, config_yaml: str, folder: Path, ranks: Ranks) -> None:
        self.cfg, self.config_yaml, self.ranks = cfg, config_yaml, ranks
        self.folder = RunFolder(folder)
        self.log: Log | None = None

    def say(self, text: str) -> None:
        """One line, from rank 0."""
        if self.ranks.leads:
            if self.log is not None:
                self.log.say(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def on_leader(self, action: Callable[[], Any]) -> Any:
        """Do it on rank 0; its result, or its error, on every rank."""
        return distributed.broadcast(distributed.together(lambda: action() if self.ranks.leads else None))

    def execute(self) -> None:
        """Train to the end.

        Raises:
            ConfigError, UserError: the same on every rank, where the cause lies before the first step.
        """
        cfg, ranks = self.cfg, self.ranks
        shard = Slice(cfg.train.batch_size, ranks.rank, ranks.world_size)
        distributed.together(lambda: cfg.per_rank(ranks.world_size))
        self.on_leader(self._prepare_folder)
        dataset = distributed.leader_first(ranks, lambda: open_dataset(cfg.data))
        self._same_everywhere(dataset)
        plan = self.on_leader(lambda: make_plan(cfg, dataset, ranks))
        precision.apply(plan.precision, deterministic=cfg.run.deterministic)
        threads = cfg.data.workers or distributed.num_threads(cfg.distributed, ranks.local_world_size)
        found = self.on_leader(lambda: self._checkpoint(dataset))
        images_seen = found.images_seen if found else 0
        if images_seen >= plan.total_images:
            self.on_leader(lambda: self._already_done(len(dataset), found))
            return
        step = distributed.together(lambda: build_step(cfg, plan, ranks))
        self.layout = resume.layout(
            cfg,
            world_size=ranks.world_size,
            threads=torch.get_num_threads(),
            precision=plan.precision,
            mode=plan.mode,
            decoder=plan.decoder,
            cache=plan.cache,
            device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        )
        wrap_players(step.players, ranks, cfg)  # gives every rank the statistics of rank 0, so it comes first
        meters = Meters(ranks.device, ranks.world_size)
        distributed.together(lambda: self._restore(step.players, meters, found))
        cached = self._build_cache(dataset, plan, threads)

        def feed_from(start: int, part: Slice) -> Feed:
            return open_feed(
                cfg.data, dataset, seed=cfg.run.seed, shard=part, device=ranks.device, images_seen=start,
                threads=threads, decoder=plan.decoder, cached=cached,
            )  # fmt: skip

        self._train(step, meters, plan, dataset, shard, images_seen, feed_from, found)

    def _same_everywhere(self, dataset: Dataset) -> None:
        found = distributed.gather(dataset.index.fingerprint)
        different = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
        if different:
            error = DataError(
                f"data.dataroot {self.cfg.data.dataroot} holds other images for ranks {different} than for 0"
            )
            error.shared = True
            raise error

    def _prepare_folder(self) -> None:
        self.folder.prepare()
        if self.cfg.run.resume == "none":
            aside = self.folder.move_aside()
            if aside:
                self.say(f"run.resume is none: what was in {self.folder.path} now lies in {aside}")
                self.folder.prepare()

    def _checkpoint(self, dataset: Dataset) -> checkpoints.Checkpoint | None:
        found = resume.choose(self.cfg, self.folder.path, self.say)
        if found:
            resume.check_identity(self.cfg, dataset.index.fingerprint, found, self.say)
            for folder in checkpoints.set_aside_after(self.folder.path, found.images_seen):
                self.say(f"a checkpoint that this run does not go on from is now {folder.name}")
        return found

    def _restore(self, players: Players, meters: Meters, found: checkpoints.Checkpoint | None) -> None:
        if found:
            for line in resume.differences(self.cfg, self.layout, found):
                self.say(line)
            state = checkpoints.load(found)
            checkpoints.restore(players, state, self.ranks.rank, self.ranks.world_size)
            meters.restore(state["meters"], self.ranks.rank)
        elif self.cfg.run.init_from:
            source = checkpoints.find(Path(self.cfg.run.init_from), self.say)
            checkpoints.restore_weights(players, checkpoints.load(source))
            self.say(f"weights from {source.folder}, counters at zero")

    def _already_done(self, num_images: int, found: checkpoints.Checkpoint) -> None:
        train = self.cfg.train
        by_images = train.max_images and train.max_images <= train.num_epochs * num_images
        key = "train.max_images" if by_images else "train.num_epochs"
        value = train.max_images if by_images else train.num_epochs
        self.say(
            f"this run is finished: {found.images_seen} images seen, {key} is {value:g}; raise --{key} to train on"
        )
        if self.folder.status.get("state") != "finished":  # killed between its last checkpoint and its end
            self._finish(found.images_seen, found.folder, float(found.manifest["elapsed_s"]))
        else:
            self.say(f"report: {self.folder.path / 'report.html'}")

    def _build_cache(self, dataset: Dataset, plan: Plan, threads: int) -> Cached | None:
        kind = plan.cache
        if kind == "none":
            return None
        said = [0.0]

        def progress(done: int, total: int) -> None:
            if time.perf_counter() - said[0] > 5 or done == total:
                said[0] = time.perf_counter()
                self.say(f"decoding once into the cache: {done}/{total}")

        return distributed.together(
            lambda: build_cache(
                self.cfg.data,
                dataset,
                decoder=plan.decoder,
                kind=kind,
                device=self.ranks.device,
                threads=threads,
                local_rank=self.ranks.local_rank,
                local_world_size=self.ranks.local_world_size,
                together=distributed.together,
                progress=progress if self.ranks.leads else None,
            )
        )

    def _train(
        self,
        step: Step,
        meters: Meters,
        plan: Plan,
        dataset: Dataset,
        shard: Slice,
        images_seen: int,
        feed_from: Callable[[int, Slice], Feed],
        found: checkpoints.Checkpoint | None,
    ) -> None:
        cfg, ranks = self.cfg, self.ranks
        progress = Progress(images_seen, plan.total_images, len(dataset))
        writer = checkpoints.Writer(self.folder.path, cfg.checkpoint.keep, cfg.checkpoint.milestone_images)
        elapsed_before = float(found.manifest["elapsed_s"]) if found else 0.0
        with contextlib.ExitStack() as stack:
            stack.callback(writer.close)
            stack.callback(lambda: self.log.close() if self.log else None)
            peak = measured_peak_tflops(ranks.device, precision.dtype_of(plan.precision))
            flops = step_flops(step.players.generator, step.players.discriminator, *cfg.data.size)

            def begin() -> None:
                self.log = Log(self.folder.path, progress)
                self._introduce(plan, dataset, images_seen, found)
                self._show_reals(feed_from, images_seen)
                if images_seen == 0:
                    self._show_fakes(step.players, 0)

            self.on_leader(begin)
            feed = feed_from(images_seen, shard)
            stack.callback(feed.close)
            timing = Timing(feed, elapsed_before)

            def log_row(seen: int) -> None:
                row = {"step": seen // cfg.train.batch_size, "images_seen": seen, "epoch": seen / len(dataset)}
                row |= meters.read() | timing.read(seen - progress.images_seen, ranks.world_size)
                achieved = flops * row["images_per_s_rank"] / 1e12
                row |= {
                    "learning_rate": step.players.optimizer_g.param_groups[0]["lr"],
                    "memory_gib": memory_gib(ranks.device),
                    "tflop_per_s": achieved,
                    "peak_fraction": achieved / peak,
                }
                progress.images_seen = seen
                if self.log is not None:
                    self.log.write(row, progress)
                    self.folder.update(images_seen=seen, **({"checkpoint": str(writer.last)} if writer.last else {}))

            def save(seen: int) -> None:
                distributed.together(writer.wait)  # a write that failed ends every rank
                mine = checkpoints.buffers_of(step.players), meters.state()
                buffers, partial = zip(*distributed.gather(mine), strict=True)
                if ranks.leads:
                    manifest = {
                        "images_seen": seen,
                        "elapsed_s": timing.elapsed_s(),
                        "identity": resume.identity(cfg, dataset.index.fingerprint),
                        "layout": self.layout,
                        "begun_from": resume.begun_from(cfg, found),
                    }
                    state = checkpoints.snapshot(step.players, list(buffers)) | {"meters": list(partial)}
                    writer.save(state, self.config_yaml, manifest)

            first_step = [True]

            def on_step(seen: int) -> None:
                if first_step[0]:
                    distributed.shorten_timeout(cfg.distributed.step_timeout_s)
                    first_step[0] = False
                if self.log is not None:
                    self.log.advance(cfg.train.batch_size)

            maintenance = [
                Maintenance(cfg.log.every_steps * cfg.train.batch_size, log_row),
                Maintenance(cfg.log.grid_every_images, lambda seen: self._show_fakes(step.players, seen)),
                Maintenance(cfg.checkpoint.every_images, save),
            ]
            images_seen = train(
                step,
                feed,
                meters,
                maintenance,
                seed=cfg.run.seed,
                shard=shard,
                nz=cfg.model.nz,
                images_seen=images_seen,
                num_steps=plan.num_steps,
                on_step=on_step,
            )
            distributed.together(writer.wait)
        if ranks.leads:
            self.log = None  # closed: what is left to say needs no bar
            self._finish(images_seen, writer.last, timing.elapsed_s())

    def _introduce(self, plan: Plan, dataset: Dataset, images_seen: int, found: checkpoints.Checkpoint | None) -> None:
        self.folder.describe(self.config_yaml)
        self.folder.update(
            state="running",
            reason="",
            exit_code=None,
            images_seen=images_seen,
            total_images=plan.total_images,
            checkpoint=str(found.folder) if found else None,
            precision=plan.precision,
            decoder=plan.decoder,
            cache=plan.cache,
            mode=plan.mode,
            world_size=self.ranks.world_size,
            fallbacks=list(plan.reasons),
            files_left_out=len(dataset.index.rejected),
        )
        for reason in plan.reasons:
            self.say(reason)
        self.say(
            f"{len(dataset)} images, {plan.num_steps} steps of {self.cfg.train.batch_size}, {self.ranks.world_size} "
            f"rank(s) with {torch.get_num_threads()} thread(s) each, into {self.folder.path}"
        )
        if found:
            self.say(f"resuming after {images_seen} images from {found.folder}")

    def _show_reals(self, feed_from: Callable[[int, Slice], Feed], images_seen: int) -> None:
        path = self.folder.path / "samples" / "reals.png"
        if path.exists() and images_seen:
            return
        feed = feed_from(0, Slice(self.cfg.log.grid_size))
        try:
            picture = grid(feed.next().cpu())
        finally:
            feed.close()
        save_png(picture, path)
        if self.log is not None:
            self.log.picture("reals", picture, 0)

    def _show_fakes(self, players: Players, images_seen: int) -> None:
        """Rank 0 draws the fixed latents with G's average; the others go on and meet it at the next all-reduce."""
        if self.log is None:
            return
        cfg = self.cfg
        generator = Generator(cfg.model.nz, cfg.model.ngf, cfg.data.nc, *cfg.data.size)
        generator.load_state_dict({k: v.float() for k, v in players.generator.state_dict().items()} | players.ema)
        generator.to(device=self.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fixed = latents(cfg.run.seed, Stream.FIXED_LATENT, 0, cfg.log.grid_size, cfg.model.nz, self.ranks.device)
        picture = grid(generate(recalibrated(generator, cfg.model.nz, images=512), fixed))
        save_png(picture, self.folder.grid(images_seen))
        self.log.picture("fakes", picture, images_seen)

    def _finish(self, images_seen: int, checkpoint: Path | None, elapsed_s: float) -> None:
        self.folder.update(
            state="finished", reason="all images seen", exit_code=0, images_seen=images_seen, checkpoint=str(checkpoint)
        )
        self.say(f"finished: {images_seen} images in {elapsed_s / 60:.1f} minutes")
        if self.cfg.log.report:
            self.say(f"report: {write_report(self.folder.path)}")
        self.say(f"pictures: {self.folder.grid(images_seen)}")


@contextlib.contextmanager
def outcome_in_status(run: Run) -> Iterator[None]:
    """What ends a run early is written into its status.json before it goes on its way."""

    def failed(reason: str, code: int) -> None:
        if run.ranks.leads and run.folder.ready:
            run.folder.update(state="failed", reason=reason, exit_code=code)

    try:
        yield
    except (ConfigError, OtherDataError):
        raise  # settings or photographs that this run refuses say nothing about the run
    except UserError as error:
        failed(str(error), error.exit_code)
        raise
    except KeyboardInterrupt:
        failed("interrupted", 130)
        raise
    except BaseException as error:
        failed(f"{type(error).__name__}: {error}", 1)
        raise


def run(cfg: Config, config_yaml: str, folder: Path) -> None:
    """Train as the settings say, on this rank.

    Raises:
        ConfigError, UserError: what a user can mend, in one line.
    """
    ranks = distributed.start(cfg.distributed)
    session = Run(cfg, config_yaml, folder, ranks)
    try:
        with outcome_in_status(session):
            session.execute()
    finally:
        distributed.stop()
