"""A run from its settings to its report: puts the rooms of the pipeline together and walks through the loop.

ranks -> dataset -> cache -> networks -> checkpoint -> feed -> loop -> report
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import checkpoint as checkpoints
from pipeline import distributed, precision, resume
from pipeline.cache import Cached, build_cache, cache_kind
from pipeline.config import Config, ConfigError
from pipeline.decode import Decoder, choose_decoder
from pipeline.distributed import Ranks
from pipeline.errors import UserError
from pipeline.feed import Feed, open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.loop import Maintenance, train
from pipeline.meters import Log, Meters, Progress, measured_peak_tflops, memory_gib
from pipeline.models import Discriminator, Generator, initialise, step_flops
from pipeline.order import Slice
from pipeline.philox import Stream
from pipeline.pictures import grid, save_png
from pipeline.precision import Precision
from pipeline.report import write_report
from pipeline.runfolder import RunFolder
from pipeline.sampling import generate, latents, recalibrated
from pipeline.step import FastStep, Players, ReferenceStep, Step, make_players


@dataclass(frozen=True)
class Plan:
    """What the settings come to on this machine with this dataset."""

    decoder: Decoder
    cache: Literal["none", "host", "device"]
    precision: Precision
    mode: str
    reasons: tuple[str, ...]
    """A sentence for each choice that was made automatically."""
    num_steps: int
    total_images: int


def make_plan(cfg: Config, dataset: Dataset, ranks: Ranks) -> Plan:
    """Resolve every `auto`; one rank does it for all, since what is free may differ from one moment to the next.

    Raises:
        ConfigError: this machine cannot do what a setting asks for.
    """
    decoder, why_decoder = choose_decoder(cfg.data)
    cache, why_cache = cache_kind(cfg.data, dataset, ranks.device, decoder=decoder)
    arithmetic = precision.resolve(cfg.precision, ranks.device)
    mode = "eager" if cfg.train.mode == "auto" else cfg.train.mode
    num_steps = cfg.train.num_steps(len(dataset))
    reasons = (f"decoder {decoder}: {why_decoder}", f"cache {cache}: {why_cache}", f"precision {arithmetic}")
    return Plan(decoder, cache, arithmetic, mode, reasons, num_steps, num_steps * cfg.train.batch_size)


def build_networks(cfg: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    """Both networks with their initial weights, the same on every rank, on the device."""
    random = torch.Generator().manual_seed(cfg.run.seed)
    generator = Generator(cfg.model.nz, cfg.model.ngf, cfg.data.nc, *cfg.data.size)
    discriminator = Discriminator(cfg.model.ndf, cfg.data.nc, *cfg.data.size)
    for network in (generator, discriminator):
        initialise(network, random)
        network.to(device=device)
        if cfg.train.channels_last:
            network.to(memory_format=torch.channels_last)
    return generator, discriminator


def build_step(cfg: Config, plan: Plan, ranks: Ranks) -> Step:
    """The networks under their optimisers, wrapped for many ranks, in the arrangement of the plan."""
    generator, discriminator = build_networks(cfg, ranks.device)
    if cfg.distributed.sync_batchnorm:
        distributed.synchronise_batchnorm(generator, ranks)
        distributed.synchronise_batchnorm(discriminator, ranks)
    lr = cfg.optim.scaled_lr(cfg.train.batch_size)
    players = make_players(generator, discriminator, cfg.optim, lr=lr, precision=plan.precision)
    kind = ReferenceStep if plan.mode == "reference" else FastStep
    return kind(
        players,
        plan.precision,
        channels_last=cfg.train.channels_last,
        ema_half_life_images=cfg.optim.ema_half_life_images,
        # SyncBatchNorm knows no groups: real and fake then go one after the other.
        joint=ranks.device.type == "cuda" and not cfg.distributed.sync_batchnorm,
    )


def wrap_players(players: Players, ranks: Ranks, cfg: Config) -> None:
    """Put both networks under DistributedDataParallel, where there are several ranks."""
    if ranks.world_size > 1:
        for name in ("generator", "discriminator"):
            players.parallel[name] = distributed.wrap(getattr(players, name), ranks, cfg.distributed)


class Run:
    """One rank's part of a run."""

    def __init__(self, cfg: Config, config_yaml: str, folder: Path, ranks: Ranks) -> None:
        self.cfg, self.config_yaml, self.ranks = cfg, config_yaml, ranks
        self.folder = RunFolder(folder)
        self.log: Log | None = None
        self.reasons: list[str] = []

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
        plan = self.on_leader(lambda: make_plan(cfg, dataset, ranks))
        precision.apply(plan.precision, deterministic=cfg.run.deterministic)
        threads = cfg.data.workers or distributed.num_threads(cfg.distributed, ranks.local_world_size)
        found = self.on_leader(lambda: self._checkpoint(dataset))
        images_seen = found.images_seen if found else 0
        if images_seen >= plan.total_images:
            self._already_done(plan, dataset, found)
            return
        step = distributed.together(lambda: build_step(cfg, plan, ranks))
        self.layout = resume.layout(
            cfg,
            world_size=ranks.world_size,
            threads=torch.get_num_threads(),
            precision=plan.precision,
            decoder=plan.decoder,
            device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        )
        wrap_players(step.players, ranks, cfg)  # gives every rank the statistics of rank 0, so it comes first
        meters = Meters(ranks.device, ranks.world_size)
        distributed.together(lambda: self._restore(step.players, meters, found))
        cached = self._build_cache(dataset, plan, threads)

        def feed_from(start: int, part: Slice) -> Feed:
            return open_feed(
                cfg.data, dataset, seed=cfg.run.seed, shard=part, device=ranks.device, images_seen=start,
                threads=threads, cached=cached,
            )  # fmt: skip

        self._train(step, meters, plan, dataset, shard, images_seen, feed_from, found)

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

    def _already_done(self, plan: Plan, dataset: Dataset, found: checkpoints.Checkpoint) -> None:
        train = self.cfg.train
        by_images = train.max_images and train.max_images <= train.num_epochs * len(dataset)
        key = "train.max_images" if by_images else "train.num_epochs"
        value = train.max_images if by_images else train.num_epochs
        self.say(
            f"this run is finished: {found.images_seen} images seen, {key} is {value:g}; raise --{key} to train on "
            f"(see {self.folder.path / 'report.html'})"
        )

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
        if ranks.leads:
            self.log = Log(self.folder.path, progress)
            self._introduce(plan, dataset, images_seen, found)
        with contextlib.ExitStack() as stack:
            stack.callback(writer.close)
            if self.log is not None:
                stack.callback(self.log.close)
            if ranks.leads:
                self._show_reals(feed_from, images_seen)
            feed = feed_from(images_seen, shard)
            stack.callback(feed.close)
            timing = Timing(feed, elapsed_before)
            peak = measured_peak_tflops(ranks.device, precision.dtype_of(plan.precision))
            flops = step_flops(step.players.generator, step.players.discriminator, *cfg.data.size)

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
                    self.folder.update(images_seen=seen)

            def save(seen: int) -> None:
                buffers, partial = zip(
                    *distributed.gather((checkpoints.buffers_of(step.players), meters.state())), strict=True
                )
                if ranks.leads:
                    manifest = {
                        "images_seen": seen,
                        "elapsed_s": timing.elapsed_s(),
                        "identity": resume.identity(cfg, dataset.index.fingerprint),
                        "layout": self.layout,
                    }
                    state = checkpoints.snapshot(step.players, list(buffers)) | {"meters": list(partial)}
                    writer.save(state, self.config_yaml, manifest)
                    self.folder.update(images_seen=seen, checkpoint=str(checkpoints.folder_of(self.folder.path, seen)))

            first_step = [True]

            def on_step(seen: int) -> None:
                if first_step[0]:
                    distributed.shorten_timeout(cfg.distributed.step_timeout_s)
                    first_step[0] = False
                if self.log is not None:
                    self.log.advance(cfg.train.batch_size)

            maintenance = [
                Maintenance(cfg.log.every_steps * cfg.train.batch_size, log_row),
                Maintenance(
                    cfg.log.grid_every_images, lambda seen: self._show_fakes(step.players, seen), at_start=True
                ),
                Maintenance(cfg.checkpoint.every_images, save),
            ]
            train(
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
            self._finish(plan, timing.elapsed_s())

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

    def _finish(self, plan: Plan, elapsed_s: float) -> None:
        self.folder.update(state="finished", reason="all images seen", exit_code=0, images_seen=plan.total_images)
        self.say(f"finished: {plan.total_images} images in {elapsed_s / 60:.1f} minutes")
        if self.cfg.log.report:
            self.say(f"report: {write_report(self.folder.path)}")
        self.say(f"pictures: {self.folder.grid(plan.total_images)}")


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
def outcome_in_status(run: Run) -> Iterator[None]:
    """What ends a run early is written into its status.json before it goes on its way."""

    def failed(reason: str, code: int) -> None:
        if run.ranks.leads and run.folder.ready:
            run.folder.update(state="failed", reason=reason, exit_code=code)

    try:
        yield
    except ConfigError:
        raise  # a setting that this run refuses says nothing about the run
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
