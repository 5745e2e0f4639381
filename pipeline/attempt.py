"""One stretch of training: from a checkpoint, or from the beginning, to the end, to a stop or to a way back.

A run is one stretch, unless training goes wrong in a way that going back may mend: then the next one begins from the
last good checkpoint, with the images that follow those at which it went wrong.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from pipeline import checkpoint as checkpoints
from pipeline import distributed, evaluating, garbage, precision, resume
from pipeline.assembly import Plan, build_step, wrap_players
from pipeline.cache import Cached
from pipeline.checkpoint_writer import Snapshots, Writer
from pipeline.environment import versions
from pipeline.errors import DataError, Diverged, Preempted
from pipeline.feed import Feed, open_feed
from pipeline.history import History
from pipeline.index import Dataset
from pipeline.loop import Maintenance, train
from pipeline.meters import Log, Meters, Progress, Timing, measured_peak_tflops, memory_gib
from pipeline.models import step_flops
from pipeline.order import Slice
from pipeline.pictures import save_png
from pipeline.profiling import Look
from pipeline.runfolder import ALL_SEEN, Outcome
from pipeline.samples import Samples
from pipeline.showing import fakes, reals
from pipeline.tracker import open_tracker
from pipeline.vote import Tally, Vote, reason_of
from pipeline.watch import CollapseWatch, Diverging, HangWatch, OwnTime, SkipWatch, SlowWatch

if TYPE_CHECKING:
    from pipeline.metrics.evaluation import Evaluation
    from pipeline.trainer import Run


@dataclass(frozen=True)
class Data:
    """What a run trains on: opened once, used by every stretch."""

    dataset: Dataset
    samples: Samples
    cached: Cached | None
    threads: int
    """Decode threads of a rank."""
    evaluation: Evaluation | None = None
    """What eval.every_images measures with."""


class _Ending(Exception):
    """Training ends here on every rank, in good order: save, then raise the error; a reason instead: all is done."""

    def __init__(self, why: Exception | str, images_seen: int) -> None:
        super().__init__(str(why))
        self.error = why if isinstance(why, Exception) else None
        self.images_seen = images_seen


class Attempt:
    """One stretch on one rank."""

    def __init__(
        self, run: Run, plan: Plan, data: Data, found: checkpoints.Checkpoint | None, history: History
    ) -> None:
        self.run, self.cfg, self.ranks, self.folder = run, run.cfg, run.ranks, run.folder
        self.plan, self.data, self.found, self.history = plan, data, found, history
        cfg, ranks = self.cfg, self.ranks
        self.shard = Slice(cfg.train.batch_size, ranks.rank, ranks.world_size)
        self.step = distributed.together(lambda: build_step(cfg, plan, ranks))
        self.layout = resume.layout(
            cfg,
            world_size=ranks.world_size,
            threads=torch.get_num_threads(),
            precision=plan.precision,
            mode=plan.mode,
            decoder=plan.decoder,
            cache=plan.cache,
            device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
            choices=run.choices.layout(),
        )
        wrap_players(self.step, ranks, cfg)  # gives every rank rank 0's statistics, so it comes first
        self.meters = Meters(ranks.device, ranks.world_size)
        distributed.together(self._restore)
        self.slow = SlowWatch(distributed.gather(socket.gethostname()), cfg.watch.slow_rank_ratio)
        self.vote = Vote(ranks.device, ranks.world_size)
        self.skips = SkipWatch(cfg.watch.max_skipped_steps)
        self.collapse = CollapseWatch(cfg.watch, self.step.losses.least_d)
        self.own_time = OwnTime(ranks.device)
        self.step.before_backward = self.own_time.end
        self._saved_at = self._settled_at = found.images_seen if found else -1
        self._has_stepped = False

    def _restore(self) -> None:
        cfg, ranks, found, players = self.cfg, self.ranks, self.found, self.step.players
        if found:
            for line in resume.differences(cfg, self.layout, found):
                self.run.say(line)
            state = checkpoints.load(found)
            checkpoints.restore(players, state, ranks.rank, ranks.world_size)
            self.meters.restore(state["meters"], ranks.rank)
        elif cfg.run.init_from:
            source = checkpoints.find(Path(cfg.run.init_from), self.run.say)
            checkpoints.restore_weights(players, checkpoints.load(source))
            self.run.say(f"weights from {source.folder}, counters at zero")

    def _feed(self, start: int, part: Slice, normalised: torch.dtype | None = None) -> Feed:
        return open_feed(
            self.cfg.data, self.data.dataset, seed=self.cfg.run.seed, shard=part, device=self.ranks.device,
            images_seen=start, threads=self.data.threads, decoder=self.plan.decoder, cached=self.data.cached,
            samples=self.data.samples, normalised=normalised,
        )  # fmt: skip

    def train(self) -> Outcome:
        """Train to the end of the run, or until evaluations say that it is enough.

        Raises:
            Diverging: the same on every rank: going back may mend it.
            Preempted, DataError: the same on every rank; a checkpoint of this step is in place.
            Diverged, StorageError: the same on every rank.
        """
        cfg, ranks, found = self.cfg, self.ranks, self.found
        self.images_seen = found.images_seen if found else 0
        self.progress = Progress(self.images_seen, self.plan.total_images, len(self.data.dataset))
        with contextlib.ExitStack() as stack:
            self.writer = Writer(
                self.folder.path, cfg.checkpoint.keep, cfg.checkpoint.milestone_images, self.run.pause_in_writes
            )
            stack.callback(self.writer.close)
            stack.callback(self.run.close_log)
            stack.callback(self.step.close)
            if ranks.leads:
                self.snapshots = Snapshots(self.step.players)
            self.peak_tflops = measured_peak_tflops(ranks.device, precision.dtype_of(self.plan.precision))
            players = self.step.players
            self.flops = step_flops(players.generator, players.discriminator, *cfg.data.size)
            self.hang = HangWatch(cfg.watch.hang_s, self.folder.path, ranks.rank, self.run.hung)
            stack.callback(self.hang.close)
            self.run.on_leader(self._begin)
            dtype = None if self.plan.gather == "torch" else precision.dtype_of(self.plan.precision)
            feed = self._feed(self.images_seen + self.history.order_offset, self.shard, dtype)
            stack.callback(feed.close)
            self.timing = Timing(feed, float(found.manifest["elapsed_s"]) if found else 0.0)
            self.look = Look(self.run, self.step, self.plan.mode, self.images_seen, self.timing.paused)
            stack.callback(self.look.close)
            stack.enter_context(garbage.collected_between_steps())
            self.run.training_begins()
            reason = ALL_SEEN
            try:
                self._evaluate_where_missing()
                self.images_seen = self._loop(feed)
            except Diverging:
                self.vote.tally()  # the ranks leave with nothing under way
                self.step.finish()
                raise
            except _Ending as ending:
                self.vote.tally()
                if ending.images_seen != self._saved_at:
                    self._save(ending.images_seen)
                if ending.error:
                    distributed.together(self.writer.wait)
                    self._update_status(ending.images_seen)
                    raise ending.error from None
                self.images_seen, reason = ending.images_seen, str(ending)
            distributed.together(self.writer.wait)
            self._update_status(self.images_seen)
            self.run.on_leader(self._sum_up)
            last = self.writer.last or (found.folder if found else None)
            return Outcome(self.images_seen, last, self.timing.elapsed_s(), reason)

    def _loop(self, feed: Feed) -> int:
        cfg = self.cfg

        def on_step(_seen: int) -> None:
            if not self._has_stepped:
                distributed.set_timeout(cfg.distributed.step_timeout_s)
                self._has_stepped = True
            self.look.done()
            self.hang.beat()
            if self.run.log is not None:
                self.run.log.advance(cfg.train.batch_size)

        def begin(_seen: int) -> None:
            self.own_time.begin()
            self.look.begin()

        every_step = cfg.train.batch_size
        maintenance = [
            Maintenance(cfg.log.every_steps * every_step, self._log_row),
            Maintenance(cfg.log.grid_every_images, self._show_fakes),
            Maintenance(every_step, self._vote),  # may end the run: after what else is due at this step
            Maintenance(cfg.checkpoint.every_images, self._save_if_good),
            *([Maintenance(cfg.eval.every_images, self._evaluate)] if self.data.evaluation else []),
            Maintenance(garbage.EVERY_STEPS * every_step, garbage.collect),
            Maintenance(every_step, begin),  # last: what maintenance takes is no work
        ]
        self.look.begin()
        return train(
            self.run.faults.wrap(self.step, cfg.train.batch_size),
            feed,
            self.meters,
            maintenance,
            seed=cfg.run.seed,
            shard=self.shard,
            nz=cfg.model.nz,
            images_seen=self.images_seen,
            num_steps=self.plan.num_steps,
            on_step=on_step,
            order_offset=self.history.order_offset,
        )

    # What all ranks know of a step, one step later

    def _vote(self, seen: int) -> None:
        before = self.vote.tally()
        self.vote.cast(seen, self._wish_to_stop(), self.step.hopeless, self.data.samples.num_replaced)
        if before:
            self._judge(before, seen)

    def _settle(self, seen: int) -> None:
        """Read the vote of this very step: before a checkpoint, and at the end."""
        pending = self.vote.tally()
        if pending:
            self._judge(pending, seen)

    def _wish_to_stop(self) -> str:
        if self.run.signals.received:
            return reason_of(self.run.signals.received)
        limit = self.cfg.train.max_minutes
        return "train.max_minutes" if limit and time.monotonic() - self.run.started > 60 * limit else ""

    def _judge(self, tally: Tally, seen: int) -> None:
        self.skips.look(tally.hopeless, seen)
        if tally.bad_samples > self.run.num_replaced:
            self._tell_replaced(tally.bad_samples, seen)
        if tally.stop and seen < self.plan.total_images:
            raise _Ending(Preempted(tally.stop, seen), seen)

    def _tell_replaced(self, total: int, seen: int) -> None:
        mine = self.data.samples.replaced
        everyone = distributed.gather(mine)
        news = [found for rank in everyone for found in rank]
        self.run.num_replaced = total
        allowed = self.cfg.data.bad_allowed(len(self.data.dataset))
        names = "; ".join(f"{key} {reason}" for key, reason in news[-3:])
        text = f"{total} of {len(self.data.dataset)} images proved bad and are replaced, at last: {names}"
        if self.ranks.leads:
            known = self.run.told_replaced
            self.folder.add_replaced([found for found in news if found not in known])
            known.update(news)
            self.folder.update(files_replaced=total)
            self._event(text, seen)
        if total > allowed:
            all_of_them = self.folder.path / "replaced.txt"
            error = DataError(f"{text}; data.max_bad_fraction allows {allowed}, {all_of_them} names all")
            raise _Ending(error.on_every_rank(), seen)

    def _event(self, text: str, seen: int) -> None:
        if self.run.log is not None:
            self.run.log.event(text, seen)
            self.folder.add_event(text, seen)

    # Maintenance

    def _log_row(self, seen: int) -> None:
        cfg, ranks = self.cfg, self.ranks
        means, own_ms = self.meters.read(ranks.rank, self.own_time.read())
        images = seen - self.progress.images_seen
        self.progress.images_seen = seen
        row = {"step": seen // cfg.train.batch_size, "images_seen": seen, "epoch": seen / self.progress.num_images}
        row |= means | self.timing.read(images, ranks.world_size)
        achieved = self.flops * row["images_per_s_rank"] / 1e12
        row |= {
            **self.step.players.learning_rates(),
            "memory_gib": memory_gib(ranks.device),
            "tflop_per_s": achieved,
            "peak_fraction": achieved / self.peak_tflops,
        }
        if self.run.log is not None:
            self.run.log.write(row, self.progress)
            self._update_status(seen)
        slow = self.slow.look(own_ms, 1e3 * cfg.train.batch_size / max(row["images_per_s"], 1e-9))
        for news in filter(None, (slow, self.step.news())):
            self._event(news, seen)
        collapsed = self.collapse.look(row, images)
        if collapsed:
            self._event(f"collapse: {collapsed}", seen)
            if cfg.watch.on_collapse == "rollback":
                raise Diverging(f"collapse: {collapsed}", seen, seen - self.collapse.held)
            if cfg.watch.on_collapse == "stop":
                raise Diverged(f"collapse: {collapsed} (watch.on_collapse is stop)").on_every_rank()

    def _save_if_good(self, seen: int) -> None:
        if seen == self._settled_at:  # an evaluation asks for it as well
            return
        self._settled_at = seen
        self._settle(seen)
        if self.skips.streak and seen < self.plan.total_images:
            self.run.say(f"no checkpoint after {seen} images: the last {self.skips.streak} step(s) were not finite")
        else:
            self._save(seen)

    def _save(self, seen: int) -> None:
        distributed.together(self.writer.wait)  # a write that failed ends every rank
        self.step.finish()
        collapsing = self.cfg.watch.on_collapse == "rollback" and self.collapse.held
        if not self.skips.streak and not collapsing:
            self.history = self.history.past_trouble(seen)
        mine = checkpoints.buffers_of(self.step.players), self.meters.state()
        buffers, partial = zip(*distributed.gather(mine), strict=True)

        def begin_write() -> None:
            if not self.ranks.leads:
                return
            manifest = {
                "images_seen": seen,
                "step": seen // self.cfg.train.batch_size,
                "world_size": self.ranks.world_size,
                "elapsed_s": self.timing.elapsed_s(),
                "identity": resume.identity(self.cfg, self.data.dataset.index.fingerprint),
                "layout": self.layout,
                "versions": versions(),
                "begun_from": resume.begun_from(self.cfg, self.found),
                **self.history.manifest(),
            }
            state = self.snapshots.take(list(buffers)) | {"meters": list(partial)}
            self.writer.save(state, self.run.config_yaml, manifest)

        distributed.together(begin_write)
        self._saved_at = seen
        self.hang.beat()

    @contextlib.contextmanager
    def _apart_from_training(self) -> Iterator[None]:
        """What happens meanwhile lowers no images/s; ranks wait for each other as long as at the start, and one that is
        long about it is not taken for one that hangs."""
        distributed.set_timeout(self.cfg.distributed.start_timeout_s)
        if self._has_stepped:
            self.hang.beat(evaluating.patience_s(self.cfg))
        with self.timing.paused():
            yield
        if self._has_stepped:
            distributed.set_timeout(self.cfg.distributed.step_timeout_s)
            self.hang.beat()

    def _evaluate(self, seen: int) -> None:
        """Measure G's average on all ranks.  The checkpoint comes first: a kill meanwhile costs the figures only, and
        the next start begins with them."""
        self._save_if_good(seen)
        assert self.data.evaluation
        self.step.finish()
        with self._apart_from_training():
            row = evaluating.measured(self.data.evaluation, self.step.players, self.cfg, seen)
            enough = self.run.on_leader(lambda: self._note(row))
        if enough and seen < self.plan.total_images:
            raise _Ending(enough, seen)

    def _note(self, row: dict[str, Any]) -> str:
        self.writer.wait()  # a checkpoint that is still being written cannot be the best
        assert self.run.log
        return evaluating.note(row, self.cfg.eval, self.folder, self.run.log)

    def _evaluate_where_missing(self) -> None:
        """What a kill has kept an earlier start from, after its last checkpoint."""
        if self.data.evaluation and self.run.on_leader(
            lambda: evaluating.missing_at(self.folder.path, self.cfg, self.images_seen, self.plan.total_images)
        ):
            self._evaluate(self.images_seen)

    def _update_status(self, seen: int) -> None:
        if self.ranks.leads:
            last = {"checkpoint": str(self.writer.last)} if self.writer.last else {}
            self.folder.update(images_seen=seen, skipped_steps=self.skips.total, **last)

    # What rank 0 shows

    def _begin(self) -> None:
        run = self.folder.path
        self.run.log = Log(run, self.progress, tracker=open_tracker(self.cfg, self.folder))
        self._introduce()
        if self.data.evaluation:
            evaluating.recall(self.cfg.eval, self.folder)
        path = run / "samples" / "reals.png"
        if not path.exists() or self.images_seen == 0:
            self._show("reals", reals(self._feed(0, Slice(self.cfg.log.grid_size))), path, 0)
        if self.images_seen == 0:
            self._show_fakes(0)
        if self.history.news:
            self._event(self.history.news, self.images_seen)

    def _introduce(self) -> None:
        plan, dataset, say = self.plan, self.data.dataset, self.run.say
        self.folder.describe(self.run.config_yaml)
        self.folder.update(
            state="running",
            reason="",
            exit_code=None,
            images_seen=self.images_seen,
            total_images=plan.total_images,
            checkpoint=str(self.found.folder) if self.found else None,
            precision=plan.precision,
            decoder=plan.decoder,
            cache=plan.cache,
            mode=plan.mode,
            world_size=self.ranks.world_size,
            fallbacks=list(plan.reasons),
            files_left_out=len(dataset.index.rejected),
            rollbacks=self.history.rollbacks,
        )
        for reason in plan.reasons:
            say(reason)
        say(
            f"{len(dataset)} images, {plan.num_steps} steps of {self.cfg.train.batch_size}, {self.ranks.world_size} "
            f"rank(s) with {torch.get_num_threads()} thread(s) each, into {self.folder.path}"
        )
        if self.found:
            say(f"resuming after {self.images_seen} images from {self.found.folder}")

    def _show(self, tag: str, picture: Image.Image, path: Path, seen: int) -> None:
        save_png(picture, path)
        if self.run.log is not None:
            self.run.log.picture(tag, picture, seen)

    def _sum_up(self) -> None:
        """The last grid, where evaluations ended the run before it was due, and TensorBoard's table of runs."""
        assert self.run.log
        if not self.folder.grid(self.images_seen).exists():
            self._show_fakes(self.images_seen)
        self.run.log.compare(
            evaluating.compared_settings(self.cfg, precision=self.plan.precision, ranks=self.ranks.world_size),
            ["Loss/D", "Loss/G", "Progress/images", *evaluating.curve_tags(self.cfg.eval)],
        )

    def _show_fakes(self, seen: int) -> None:
        """Rank 0 draws; the others go on and meet it at the next all-reduce."""
        if self.ranks.leads:
            self.step.finish()
            self._show("fakes", fakes(self.step.players, self.cfg), self.folder.grid(seen), seen)
