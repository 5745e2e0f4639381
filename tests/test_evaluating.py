"""Evaluation while training: what is written and kept, when it ends a run, what a kill costs, that it changes nothing.

Most runs here get their figures from a list, so that a test can say which checkpoint is to be the best.
"""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from pipeline import checkpoint as checkpoints
from pipeline import distributed, evaluating
from pipeline.checkpoint_writer import mark_best
from pipeline.cli import train as command
from pipeline.config import EvalConfig
from pipeline.index import open_dataset
from pipeline.meters import rows_up_to, write_rows
from pipeline.runfolder import RunFolder
from pipeline.sampling import recalibrated
from pipeline.watch import CollapseWatch, HangWatch
from tests.commands import IMAGES as FACES
from tests.commands import (
    assert_bit_equal,
    kill_tree,
    make_workspace,
    rows,
    started,
    state_of,
    status_of,
    wait_for,
)
from tests.commands import command as command_of
from tests.commands import train as train_for_good
from tests.numbered import record_of, recorded, words, write_numbered
from tests.players import assert_same
from tests.ranks import Launch, run_launches

IMAGES = 10
BY_SWD = EvalConfig(every_images=8, num_images=8)


def test_when_training_begins_the_best_is_chosen_again_by_what_is_there(tmp_path):
    """The best of two was set aside by a way back, the best before it pruned: the third is left."""
    folder = RunFolder(tmp_path)
    folder.prepare()
    kept = [
        {"images_seen": seen, "num_images": 8, "seconds": 1.0, "swd": swd, "best": seen == 8}
        for seen, swd in ((8, 5.0), (12, 6.0))
    ]
    write_rows(tmp_path / "metrics.jsonl", kept)
    checkpoints.folder_of(tmp_path, 12).mkdir(parents=True)
    mark_best(tmp_path, checkpoints.folder_of(tmp_path, 16))
    evaluating.recall(BY_SWD, folder)
    assert checkpoints.best(tmp_path) == "images-000000012"
    assert figures_of(tmp_path) == [(8, 5.0, False), (12, 6.0, True)]
    assert folder.status["best"] == {"metric": "swd", "value": 6.0, "images_seen": 12}
    assert folder.status["metrics"]["images_seen"] == 12
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    evaluating.recall(BY_SWD, folder)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


# Runs


class Scripted:
    """In the measurement's place: at each call the next of these figures, or what is raised or done."""

    def __init__(self, *figures: Any) -> None:
        self.figures = iter(figures)

    def measure(self, generator: torch.nn.Module) -> dict[str, float]:
        assert not generator.training
        found = next(self.figures)
        if isinstance(found, BaseException):
            raise found
        if callable(found):
            found = found()
        return {"swd": found, "ms_ssim": 0.5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("evaluating") / "images", IMAGES)


@pytest.fixture
def train(images, tmp_path, capsys, monkeypatch):
    """Calls the command on one rank with the figures that its evaluations are to find; exit code and what it said."""

    def call(*figures: Any, run: str = "run", **settings: Any) -> tuple[int, str]:
        settings = {"train__max_images": 32, "eval__every_images": 8, "eval__num_images": 8} | settings
        capsys.readouterr()
        with monkeypatch.context() as patch, recorded(tmp_path / f"{run}.jsonl"):
            patch.setattr(
                evaluating,
                "open_evaluation",
                lambda cfg, *_, **__: Scripted(*figures) if cfg.eval.every_images else None,
            )
            code = command.main(words(images, tmp_path / run, **settings))
        return code, capsys.readouterr().err

    return call


def saved(run: Path) -> list[int]:
    return [checkpoints.count_of(p) for p in checkpoints.folders(run)]


def figures_of(run: Path) -> list[tuple[int, float, bool]]:
    return [(row["images_seen"], row["swd"], row["best"]) for row in rows(run / "metrics.jsonl")]


def end_of(run: Path) -> checkpoints.State:
    return checkpoints.load(checkpoints.newest(run))


def board_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_each_evaluation_is_written_down_told_and_drawn_and_the_best_checkpoint_is_kept(train, tmp_path):
    code, said = train(5.0, 3.0, math.nan, 4.0, checkpoint__every_images=4, checkpoint__keep=1)
    run = tmp_path / "run"
    assert code == 0
    assert figures_of(run) == [(8, 5.0, True), (16, 3.0, True), (24, None, False), (32, 4.0, False)]
    first = rows(run / "metrics.jsonl")[0]
    assert first.keys() == {"images_seen", "num_images", "seconds", "swd", "ms_ssim", "best"}
    assert first["num_images"] == 8
    assert saved(run) == [16, 32], "the best and the newest"
    assert checkpoints.chosen(run, "best").images_seen == 16
    assert [text for text in said.splitlines() if text.startswith("metrics: ")] == [
        "metrics: swd 5 (the best so far)  ms_ssim 0.5",
        "metrics: swd 3 (the best so far)  ms_ssim 0.5",
        "metrics: swd nan (best 3 after 16 images)  ms_ssim 0.5",
        "metrics: swd 4 (best 3 after 16 images)  ms_ssim 0.5",
    ]
    status = status_of(run)
    assert status["best"] == {"metric": "swd", "value": 3.0, "images_seen": 16}
    assert (status["metrics"]["images_seen"], status["metrics"]["swd"]) == (32, 4.0)
    board = board_of(run)
    points = {
        tag: [(e.step, e.value) for e in board.Scalars(f"Metrics/{tag}")] for tag in ("swd", "best_swd", "ms_ssim")
    }
    assert points["swd"] == [(8, 5.0), (16, 3.0), (32, 4.0)]
    assert points["best_swd"] == [(8, 5.0), (16, 3.0), (24, 3.0), (32, 3.0)]
    assert points["ms_ssim"] == [(n, 0.5) for n in (8, 16, 24, 32)]


def test_tensorboards_table_of_runs_gets_settings_and_curves_in_the_same_folder(train, tmp_path):
    assert train(5.0, 3.0, 6.0, 4.0, d_input__augment="[color, cutout]")[0] == 0
    folder = tmp_path / "run" / "tensorboard"
    assert all(path.is_file() for path in folder.iterdir()), "a folder of its own would be another run"
    board = board_of(tmp_path / "run")
    content = board.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["optim.lr"].number_value == 2e-4
    assert start.hparams["d_input.augment"].string_value == "color, cutout"
    assert start.hparams["precision"].string_value == "fp32"
    assert start.hparams["data.image_size"].string_value == "16x16"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    metrics = {each.name.tag for each in experiment.metric_infos}
    assert {"Metrics/swd", "Metrics/best_swd", "Loss/D"} <= metrics
    assert metrics <= set(board.Tags()["scalars"]), "each is a curve whose last point the table shows"


def test_a_run_that_gets_no_better_ends_well_and_says_so_again_until_patience_is_raised(train, tmp_path):
    settings = {"eval__patience": 2, "train__max_images": 40}
    code, said = train(5.0, 3.0, 6.0, 4.0, **settings)
    run = tmp_path / "run"
    reason = "no better swd in 2 evaluation(s); best 3 after 16 images"
    assert code == 0
    assert said.splitlines()[-2].endswith(f" minutes: {reason}")
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["reason"]) == ("finished", 0, reason)
    assert (status["images_seen"], Path(status["checkpoint"]).name) == (32, "images-000000032")
    assert (run / "samples" / "fakes-000000032.png").exists()
    assert "_hparams_/session_start_info" in board_of(run).PluginTagToContent("hparams")

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, said = train(**settings)
    assert code == 0
    assert f"this run is finished: {reason}; raise --eval.patience to train on, or set it to 0" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    status = {key: value for key, value in status.items() if key != "state"}  # killed just before its end
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "reason": ""}))
    assert train(**settings)[0] == 0
    assert (status_of(run)["state"], status_of(run)["reason"]) == ("finished", reason)

    code, said = train(9.0, **settings | {"eval__patience": 3})
    assert code == 0
    assert figures_of(run)[-1] == (40, 9.0, False)
    assert status_of(run)["reason"] == "all images seen"
    assert train(*[9.0] * 5, run="whole", **settings | {"eval__patience": 0})[0] == 0
    assert_same(end_of(run), end_of(tmp_path / "whole"))


class Killed(BaseException):
    """As a kill would: nothing is saved or told after it."""


def test_a_kill_in_an_evaluation_costs_its_figures_only_and_the_next_start_begins_with_them(train, tmp_path):
    figures = [5.0, 3.0, 6.0, 4.0]
    assert train(*figures, run="whole")[0] == 0
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(5.0, Killed())
    assert saved(run) == [8, 16], "the checkpoint comes first"
    assert figures_of(run) == [(8, 5.0, True)]
    with pytest.raises(Killed):  # once more, in the last one, after which no step is left to make
        train(3.0, 6.0, Killed())
    assert figures_of(run) == [(8, 5.0, True), (16, 3.0, True), (24, 6.0, False)]
    code, said = train(4.0)
    assert code == 0
    assert "metrics: swd 4 (best 3 after 16 images)" in said
    assert figures_of(run) == figures_of(tmp_path / "whole")
    assert checkpoints.best(run) == checkpoints.best(tmp_path / "whole")
    assert record_of(tmp_path / "run.jsonl") == record_of(tmp_path / "whole.jsonl"), "no step twice"
    assert_same(end_of(run), end_of(tmp_path / "whole"))
    assert [row["images_seen"] for row in rows(run / "stats.jsonl")] == list(range(4, 33, 4))
    assert status_of(run)["state"] == "finished"
    assert "this run is finished" in train()[1]


def test_a_signal_during_an_evaluation_lets_it_end_and_then_stops(train, tmp_path):
    def told_to_stop() -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 3.0

    assert train(5.0, told_to_stop)[0] == 75
    run = tmp_path / "run"
    assert figures_of(run) == [(8, 5.0, True), (16, 3.0, True)]
    # The vote of the next step hears of it, and the one after reads that vote.
    assert saved(run) == [8, 16, 24]
    assert train(6.0, 4.0)[0] == 0
    assert figures_of(run) == [(8, 5.0, True), (16, 3.0, True), (24, 6.0, False), (32, 4.0, False)]


def test_going_back_takes_figures_back_and_the_next_best_counts(train, tmp_path, monkeypatch):
    look, told = CollapseWatch.look, []

    def collapses_once(self: CollapseWatch, row: dict[str, Any], images: int) -> str:
        bad = row["images_seen"] > 16 and not told
        news = look(self, row | {"loss_d": 0.0 if bad else 1.0}, images)
        told.extend([news] if news else [])
        return news

    monkeypatch.setattr(CollapseWatch, "look", collapses_once)
    status: list[Any] = []

    def after_the_way_back() -> float:
        status.append((status_of(tmp_path / "run"), checkpoints.best(tmp_path / "run")))
        return 4.0

    settings = {"watch__on_collapse": "rollback", "watch__min_diversity": 0, "watch__collapse_images": 12}
    code, _ = train(5.0, 6.0, 1.0, after_the_way_back, 7.0, checkpoint__keep=99, **settings)
    assert code == 0
    run = tmp_path / "run"
    assert (run / "checkpoints/images-000000024.abandoned").is_dir(), "what was the best"
    ((back, mark),) = status
    assert back["best"] == {"metric": "swd", "value": 5.0, "images_seen": 8}
    assert back["metrics"]["images_seen"] == 16
    assert mark == "images-000000008"
    assert figures_of(run) == [(8, 5.0, True), (16, 6.0, False), (24, 4.0, True), (32, 7.0, False)]
    assert checkpoints.chosen(run, "best").images_seen == 24


def test_no_checkpoint_of_a_step_that_was_not_finite_becomes_the_best(train, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_FAULT", "nan:0:3")
    code, said = train(5.0, 1.0, 4.0, 6.0, checkpoint__every_images=8)
    assert code == 0
    assert said.count("no checkpoint after 16 images") == 1
    assert figures_of(tmp_path / "run") == [(8, 5.0, True), (16, 1.0, False), (24, 4.0, True), (32, 6.0, False)]


def test_an_evaluation_may_take_as_long_as_the_start_and_is_no_hang(train, monkeypatch):
    limits: list[int] = []
    beats: list[float] = []
    during: list[tuple[int, float]] = []
    monkeypatch.setattr(distributed, "set_timeout", limits.append)
    monkeypatch.setattr(HangWatch, "beat", lambda _, patience_s=0.0: beats.append(patience_s))

    def slow() -> float:
        during.append((limits[-1], beats[-1]))
        return 5.0

    settings = {"distributed__start_timeout_s": 1234, "distributed__step_timeout_s": 56, "train__max_images": 16}
    assert train(slow, slow, **settings)[0] == 0
    assert during == [(1234, 1234 + 8 * 0.5)] * 2, "half a second an image for both sides besides"
    assert limits == [56, 1234, 56, 1234, 56]
    assert beats[-1] == 0


def test_a_dry_run_tells_what_will_be_measured(images, tmp_path, capsys):
    settings = {"train__max_images": 32, "eval__every_images": 12, "eval__num_images": 8, "eval__patience": 3}
    assert command.main([*words(images, tmp_path / "run", **settings), "--dry-run"]) == 0
    (told,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("evaluations ")]
    assert told.split(maxsplit=1)[1] == (
        "3, every 12 images and at the end: swd, ms_ssim of 8 images; the best by swd is kept, "
        "3 without a better one end the run"
    )
    assert command.main([*words(images, tmp_path / "run", **settings | {"eval__num_images": 11}), "--dry-run"]) == 2
    assert "eval.num_images must be at most the 10 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# With what really measures

MEASURED = {"train__max_images": 24, "eval__every_images": 8, "eval__num_images": 8}


def assert_nothing_changed(plain: Path, measured: Path) -> None:
    assert_same(end_of(measured), end_of(plain))
    losses = [[row["loss_d"] for row in rows(run / "stats.jsonl")] for run in (plain, measured)]
    assert losses[0] == losses[1]
    assert not (plain / "metrics.jsonl").exists()
    found = rows(measured / "metrics.jsonl")
    assert [row["images_seen"] for row in found] == [8, 16, 24]
    assert all(0 < row["swd"] < math.inf and 0 <= row["ms_ssim"] <= 1 for row in found)
    best = min(found, key=lambda row: row["swd"])
    assert checkpoints.chosen(measured, "best").images_seen == best["images_seen"]


def test_evaluation_changes_no_bit_of_training(images, tmp_path, monkeypatch):
    """And what is told while training is what the checkpoint gives when it is opened again."""
    plain, run = tmp_path / "plain", tmp_path / "measured"
    assert command.main(words(images, plain, **MEASURED | {"eval__every_images": 0})) == 0
    measured, calls = evaluating.measured, []

    def with_random_states(*arguments: Any) -> dict[str, Any]:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found = measured(*arguments)
        calls.append(torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1])
        return found

    monkeypatch.setattr(evaluating, "measured", with_random_states)
    assert command.main(words(images, run, **MEASURED)) == 0
    assert calls == [True] * 3
    assert_nothing_changed(plain, run)

    _, config, _ = checkpoints.open_generator(run)
    evaluation = evaluating.open_evaluation(
        config, open_dataset(config.data), distributed.from_environment(), decoder="pillow", cached=None
    )
    assert evaluation
    for row in rows(run / "metrics.jsonl"):
        generator, _, _ = checkpoints.open_generator(checkpoints.folder_of(run, row["images_seen"]))
        again = evaluation.measure(recalibrated(generator, config.model.nz))
        assert {name: row[name] for name in again} == pytest.approx(again, rel=1e-6)


def test_on_two_ranks_as_well_and_what_cannot_be_measured_both_tell_once(images, tmp_path, capfd):
    plain, run, refused = (tmp_path / name for name in ("plain", "measured", "refused"))
    settings = [(plain, {"eval__every_images": 0}), (run, {}), (refused, {"eval__num_images": IMAGES + 1})]
    launches = [Launch(2, words(images, folder, **MEASURED | changed)) for folder, changed in settings]
    assert run_launches(launches) == [[0, 0], [0, 0], [2, 2]]
    assert_nothing_changed(plain, run)
    said = capfd.readouterr().err
    assert [text for text in said.splitlines() if "error" in text] == [
        "train.py: error: eval.num_images must be at most the 10 images of data.dataroot, got 11"
    ]
    assert "Traceback" not in said
    assert not (refused / "stats.jsonl").exists()
    assert not (refused / "checkpoints").exists()


def test_inceptions_weights_are_looked_at_before_training_begins(images, tmp_path, capsys):
    weights = tmp_path / "inception.pth"
    weights.write_text("something else")
    wanted = {"eval__metrics": "[swd, fid]", "eval__inception_weights": weights}
    assert command.main(words(images, tmp_path / "run", **MEASURED | wanted)) == 65
    (told,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("train.py: error: ")]
    assert str(weights) in told
    assert not (tmp_path / "run" / "stats.jsonl").exists()


@pytest.mark.faults
def test_killed_in_an_evaluation_under_torchrun_the_same_command_makes_it_up(tmp_path):
    """SIGKILL of both ranks once the checkpoint is there and the figures are not: midway, and at the end."""
    workspace, last = make_workspace(tmp_path), 240
    lasting = ("--train.max_images", str(last), "--checkpoint.keep", "9")
    measured = (*lasting, "--eval.every_images", "80", "--eval.num_images", str(FACES))
    run = workspace / "run"
    for images_seen, lines in ((80, 0), (last, 2)):
        with started(command_of(workspace, "run", 2, *measured), workspace / "log") as process:
            folder = checkpoints.folder_of(run, images_seen)
            wait_for(folder.is_dir, f"the checkpoint before the evaluation after {images_seen} images", process)
            kill_tree(process.pid)
        assert len(rows_up_to(run / "metrics.jsonl")) == lines
    train_for_good(workspace, "run", 2, *measured)
    train_for_good(workspace, "whole", 2, *measured)
    train_for_good(workspace, "plain", 2, *lasting)
    figures = [figures_of(workspace / name) for name in ("run", "whole")]
    assert figures[0] == figures[1]
    assert [images_seen for images_seen, *_ in figures[0]] == [80, 160, last]
    for name in ("whole", "plain"):
        assert_bit_equal(state_of(run, last), state_of(workspace / name, last))
