"""A run from its settings to its report: puts the rooms of the pipeline together.

ranks -> dataset -> cache -> checkpoint -> attempt (networks, feed, loop) -> report
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from pipeline import checkpoint as checkpoints
from pipeline import distributed, evaluating, precision, resume
from pipeline.assembly import Plan, make_plan
from pipeline.attempt import Attempt, Data
from pipeline.cache import Cached, build_cache, folder_identity
from pipeline.candidates import settle
from pipeline.choices import Choices
from pipeline.config import Config, ConfigError
from pipeline.distributed import Ranks
from pipeline.errors import DataError, Diverged, OtherDataError, Preempted, StorageError, UserError
from pipeline.faults import Faults
from pipeline.history import History, after_trouble, history_of
from pipeline.index import Dataset, cache_folder, open_dataset
from pipeline.meters import Log
from pipeline.report import write_report
from pipeline.runfolder import ALL_SEEN, Outcome, RunFolder
from pipeline.samples import Samples
from pipeline.signals import StopSignals
from pipeline.watch import Diverging

_CAUSE_PATIENCE_S = 1.5
"""A rank that lost another waits so long for that one's own account of what happened."""

_LATER_S = 1.1
"""So long after the loss it gives torchrun its own: in a later second than the one that was lost."""


class Run:
    """One rank's part of a run."""

    def __init__(self, cfg: Config, config_yaml: str, folder: Path, ranks: Ranks, signals: StopSignals) -> None:
        self.cfg, self.config_yaml, self.ranks, self.signals = cfg, config_yaml, ranks, signals
        self.folder = RunFolder(folder)
        self.log: Log | None = None
        self.started = time.monotonic()
        self.faults = Faults.from_environment(ranks.rank)
        self.told_replaced: set[tuple[str, str]] = set()
        """Bad files that rank 0 has named."""
        self.num_replaced = 0
        """Bad files of all ranks."""

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
            Preempted: the same on every rank; a checkpoint is in place.
        """
        cfg, ranks = self.cfg, self.ranks
        distributed.together(lambda: cfg.per_rank(ranks.world_size))
        self.folder.launch = self.on_leader(self._prepare_folder)
        self.folder.ready = True
        dataset = distributed.leader_first(ranks, lambda: open_dataset(cfg.data))
        self._same_everywhere(dataset)
        plan: Plan = self.on_leader(lambda: make_plan(cfg, dataset, ranks))
        precision.apply(plan.precision, deterministic=cfg.run.deterministic)
        threads = cfg.data.workers or distributed.num_threads(cfg.distributed, ranks.local_world_size)
        found = self.on_leader(lambda: self._checkpoint(dataset))
        if found and self.on_leader(lambda: self._already_done(len(dataset), plan, found)):
            return
        self.choices = self._choices()
        plan = settle(cfg, plan, ranks, self.choices)
        samples = Samples(dataset)
        cached = self._build_cache(dataset, samples, plan, threads)
        evaluation = distributed.together(
            lambda: evaluating.open_evaluation(
                cfg, dataset, ranks, decoder=plan.decoder, cached=cached, samples=samples, threads=threads, say=self.say
            )
        )
        data = Data(dataset, samples, cached, threads, evaluation)
        history = history_of(found)
        while True:
            attempt = Attempt(self, plan, data, found, history)
            try:
                outcome = attempt.train()
                break
            except Diverging as trouble:
                found, history = self._go_back(trouble, attempt.history)
            del attempt
            gc.collect()  # its networks make room for the next one's; only here does no traceback hold them
        if ranks.leads:
            self._finish(outcome)

    def _go_back(self, trouble: Diverging, history: History) -> tuple[checkpoints.Checkpoint | None, History]:
        """The newest good checkpoint and what to remember; of trouble that came back, one that is older."""
        run = self.folder.path

        def choose() -> checkpoints.Checkpoint | None:
            newest = checkpoints.newest(run, self.say, below=trouble.began + 1)
            if newest and newest.images_seen == history.went_back_to:
                newest = checkpoints.newest(run, self.say, below=history.went_back_to) or newest
            return newest

        found: checkpoints.Checkpoint | None = self.on_leader(choose)
        # May end the run, and then leaves the checkpoints as they are.
        history = after_trouble(history, trouble, found, self.cfg.watch.max_rollbacks)
        self.on_leader(lambda: checkpoints.set_aside_after(run, found.images_seen if found else 0))
        return found, history

    def _same_everywhere(self, dataset: Dataset) -> None:
        found = distributed.gather(dataset.index.fingerprint)
        different = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
        if different:
            raise DataError(
                f"data.dataroot {self.cfg.data.dataroot} holds other images for ranks {different} than for 0"
            ).on_every_rank()

    def _prepare_folder(self) -> str:
        self.folder.prepare()
        status = self.folder.status
        restarted = distributed.restart_count() > 0
        final = status.get("exit_code") in (DataError.exit_code, Diverged.exit_code)
        if restarted and final and status.get("launcher", "") == distributed.launcher():
            # torchrun restarts whatever failed; this would fail again.
            error = DataError if status["exit_code"] == DataError.exit_code else Diverged
            raise error(f"not tried again: {str(status['reason']).removeprefix('not tried again: ')}")
        # A restart goes on: resume none was about what an earlier run left here.
        if self.cfg.run.resume == "none" and not restarted:
            aside = self.folder.move_aside()
            if aside:
                self.say(f"run.resume is none: what was in {self.folder.path} now lies in {aside}")
                self.folder.prepare()
        checkpoints.clear_leftovers(self.folder.path)
        return uuid.uuid4().hex

    def _choices(self) -> Choices:
        return Choices(
            self.ranks.device,
            cache=distributed.together(lambda: cache_folder(self.cfg.data)),
            run=self.folder.path,
            overrides=self.cfg.kernels.choices,
            leads=self.ranks.leads,
            say=self.say,
        )

    def _checkpoint(self, dataset: Dataset) -> checkpoints.Checkpoint | None:
        cfg = self.cfg
        if cfg.run.resume == "none" and distributed.restart_count() > 0:
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, resume="auto"))
        found = resume.choose(cfg, self.folder.path, self.say)
        if found:
            resume.check_identity(cfg, dataset.index.fingerprint, found, self.say)
        for folder in checkpoints.set_aside_after(self.folder.path, found.images_seen if found else -1):
            self.say(f"a checkpoint that this run does not go on from is now {folder.name}")
        return found

    def _already_done(self, num_images: int, plan: Plan, found: checkpoints.Checkpoint) -> bool:
        """Whether there is nothing left to train; says so, and ends what a kill has left without an end."""
        cfg, run, train = self.cfg, self.folder.path, self.cfg.train
        finished = self.folder.status.get("state") == "finished"
        reason = ALL_SEEN
        if found.images_seen >= plan.total_images:
            if not finished and evaluating.missing_at(run, cfg, found.images_seen, plan.total_images):
                return False  # killed in its last evaluation
            by_images = train.max_images and train.max_images <= train.num_epochs * num_images
            key = "train.max_images" if by_images else "train.num_epochs"
            value = train.max_images if by_images else train.num_epochs
            why = f"{found.images_seen} images seen, {key} is {value:g}; raise --{key} to train on"
        else:
            reason = evaluating.enough(run, cfg.eval, found.images_seen)
            if not reason:
                return False
            why = f"{reason}; raise --eval.patience to train on, or set it to 0"
        self.say(f"this run is finished: {why}")
        if finished:
            self.say(f"report: {run / 'report.html'}")
        else:  # killed between its last checkpoint and its end
            self._finish(Outcome(found.images_seen, found.folder, float(found.manifest["elapsed_s"]), reason))
        return True

    def _build_cache(self, dataset: Dataset, samples: Samples, plan: Plan, threads: int) -> Cached | None:
        kind = plan.cache
        if kind == "none":
            return None
        said = [0.0]

        def progress(done: int, total: int) -> None:
            if time.perf_counter() - said[0] > 5 or done == total:
                said[0] = time.perf_counter()
                self.say(f"decoding once into the cache: {done}/{total}")

        folders = distributed.gather(distributed.together(lambda: folder_identity(self.cfg.data)))
        sharing = [rank for rank, folder in enumerate(folders) if folder == folders[self.ranks.rank]]
        return distributed.together(
            lambda: build_cache(
                self.cfg.data,
                dataset,
                decoder=plan.decoder,
                kind=kind,
                device=self.ranks.device,
                threads=threads,
                local_rank=sharing.index(self.ranks.rank),
                local_world_size=len(sharing),
                together=distributed.together,
                progress=progress if self.ranks.leads else None,
                samples=samples,
            )
        )

    # What an attempt asks of its run

    def training_begins(self) -> None:
        """From here on a signal is noted and voted on; before, it ends the program."""
        self.signals.training = True

    def close_log(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None  # what is left to say needs no bar

    def pause_in_writes(self) -> None:
        """A fault on purpose."""
        seconds = self.faults.slow_write()
        if seconds:
            time.sleep(seconds)

    def hung(self, reason: str) -> None:
        self.failed(TimeoutError(reason), 1)

    # How it ended

    def _finish(self, outcome: Outcome) -> None:
        self.folder.finish(outcome)
        early = "" if outcome.reason == ALL_SEEN else f": {outcome.reason}"
        self.say(f"finished: {outcome.images_seen} images in {outcome.elapsed_s / 60:.1f} minutes{early}")
        if self.cfg.log.report:
            self.say(f"report: {write_report(self.folder.path)}")
        grid = self.folder.grid(outcome.images_seen)
        if grid.exists():  # not where evaluations ended the run and a kill came between
            self.say(f"pictures: {grid}")

    def preempted(self, stop: Preempted) -> None:
        if self.ranks.leads and self.folder.ready:
            self.folder.update(state="preempted", reason=stop.reason, exit_code=stop.exit_code)

    def failed(self, error: BaseException, code: int) -> None:
        """Write down what ended this rank, and into status.json what ended the run first."""
        seen = time.monotonic()
        lost = distributed.lost_peer(error)
        if not lost:
            self._tell_torchrun(error)
        if self.folder.ready:
            try:
                self._write_failure(error, code)
            except (OSError, StorageError) as problem:  # a full disk, say: the exit code still tells
                print(f"cannot write down how it ended: {problem}", file=sys.stderr, flush=True)
        if lost:
            time.sleep(max(0.0, _LATER_S - (time.monotonic() - seen)))
            self._tell_torchrun(error)

    def _tell_torchrun(self, error: BaseException) -> None:
        """It names the rank whose account is the oldest, by the second; of two in the same second, the lower rank."""
        with contextlib.suppress(OSError):  # a full disk
            get_error_handler().record_exception(error)

    def _write_failure(self, error: BaseException, code: int) -> None:
        if isinstance(error, UserError | ConfigError) and error.shared:
            if self.ranks.leads:
                self.folder.update(state="failed", reason=str(error), exit_code=code, launcher=distributed.launcher())
            return
        lost = distributed.lost_peer(error)
        self.folder.add_failure(self.ranks.rank, error, code, lost_peer=lost)
        # Every rank that fails writes the same, so that it is there whichever of them are killed.
        reason, code = self.folder.root_cause(_CAUSE_PATIENCE_S if lost else 0.0)
        self.folder.update(state="failed", reason=reason, exit_code=code, launcher=distributed.launcher())

    def ended_at_once(self, number: int) -> None:
        """By a second signal."""
        if self.ranks.leads and self.folder.ready:
            reason = "a second signal ended it at once; the last checkpoint stands"
            self.folder.update(state="failed", reason=reason, exit_code=128 + number)


@contextlib.contextmanager
def outcome_in_status(run: Run) -> Iterator[None]:
    """What ends a run early is written into its status.json before it goes on its way."""
    try:
        yield
    except (ConfigError, OtherDataError):
        raise  # settings or photographs that this run refuses say nothing about the run
    except Preempted as stop:
        run.preempted(stop)
        raise
    except UserError as error:
        run.failed(error, error.exit_code)
        raise
    except BaseException as error:
        run.failed(error, 1)
        raise


def run(cfg: Config, config_yaml: str, folder: Path) -> None:
    """Train as the settings say, on this rank.

    Raises:
        ConfigError, UserError: what a user can mend, in one line.
        Preempted: told to stop; the same command goes on.
    """
    with StopSignals() as signals:
        ranks = distributed.start(cfg.distributed)
        session = Run(cfg, config_yaml, folder, ranks, signals)
        signals.at_once = session.ended_at_once
        try:
            with distributed.leaving_together(), outcome_in_status(session):
                session.execute()
        except Preempted as stop:
            if stop.images_seen:  # all ranks leave together; before the first step each leaves when its signal comes
                distributed.stop()
            raise
