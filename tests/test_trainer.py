"""A run from its start to its end, in this process: limits, restarts, what is left when it stops."""

import json

import pytest

from pipeline import checkpoint as checkpoints
from pipeline.cli import train as command
from tests.commands import rows, status_of
from tests.numbered import record_of, recorded, words, write_numbered
from tests.players import assert_same

WHOLE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("trainer") / "images", 6)


@pytest.fixture
def train(images, tmp_path, capsys):
    """Calls the command with settings; its exit code and what it said."""

    def call(run="run", dataroot=None, **settings):
        settings = {"train__max_images": WHOLE, "checkpoint__every_images": 8} | settings
        capsys.readouterr()
        with recorded(tmp_path / f"{run}.jsonl"):
            code = command.main(words(dataroot or images, tmp_path / run, **settings))
        return code, capsys.readouterr().err

    return call


def end_of(run):
    return checkpoints.load(checkpoints.newest(run))


def test_a_time_limit_stops_and_saves_and_the_same_command_goes_on_to_the_same_weights(train, tmp_path):
    assert train("whole")[0] == 0
    starts = 0
    code = None
    while code != 0:
        code, said = train(train__max_minutes=0.0001)
        starts += 1
        status = status_of(tmp_path / "run")
        seen = checkpoints.newest(tmp_path / "run").images_seen
        assert status["images_seen"] == seen
        if code:
            assert (code, status["state"], status["reason"]) == (75, "preempted", "train.max_minutes")
            assert status["exit_code"] == 75
            assert f"stopped by train.max_minutes after {seen} images, saved; the same command goes on" in said
        assert starts < 10
    assert starts > 2
    assert status["state"] == "finished"
    assert_same(end_of(tmp_path / "run"), end_of(tmp_path / "whole"))
    both = [[r["loss_d"] for r in rows(tmp_path / run / "stats.jsonl")] for run in ("whole", "run")]
    assert both[0] == both[1]
    assert record_of(tmp_path / "run.jsonl") == record_of(tmp_path / "whole.jsonl"), "no step twice"

    code, _ = train("lifted", train__max_minutes=0.0001)
    assert code == 75
    assert train("lifted")[0] == 0
    assert_same(end_of(tmp_path / "lifted"), end_of(tmp_path / "whole"))


def test_a_limit_that_is_reached_in_the_last_step_is_no_preemption(train):
    assert train(train__max_images=4, train__max_minutes=0.0001)[0] == 0


def test_ds_own_learning_rate_stands_in_every_row_where_it_has_one(train, tmp_path):
    assert train(optim__lr=2e-4, optim__lr_d=5e-5, train__max_images=8)[0] == 0
    assert [(r["learning_rate"], r["learning_rate_d"]) for r in rows(tmp_path / "run/stats.jsonl")] == [
        (2e-4, 5e-5)
    ] * 2
    assert train("one", train__max_images=8)[0] == 0
    assert all("learning_rate_d" not in row for row in rows(tmp_path / "one/stats.jsonl"))


def test_ds_penalty_stands_in_the_rows_of_steps_in_which_it_is_due(train, tmp_path):
    assert train(loss__r1=10.0, loss__r1_every=2)[0] == 0
    found = ["penalty_d" in row for row in rows(tmp_path / "run/stats.jsonl")]
    assert found == [True, False] * 4
    assert train("plain", train__max_images=8)[0] == 0
    assert all("penalty_d" not in row for row in rows(tmp_path / "plain/stats.jsonl"))


def test_watching_for_numbers_that_are_not_finite_changes_no_bit_of_a_healthy_run(train, tmp_path):
    for guarded in ("true", "false"):
        assert train(guarded, watch__skip_non_finite=guarded)[0] == 0
    assert_same(end_of(tmp_path / "true"), end_of(tmp_path / "false"))


def test_run_resume_none_begins_anew_but_a_restart_by_torchrun_goes_on(train, tmp_path, monkeypatch):
    assert train(train__max_images=8)[0] == 0
    assert train(run__resume="none", train__max_images=16)[0] == 0
    assert (tmp_path / "run/replaced-001").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, said = train(run__resume="none")
    assert code == 0
    assert "resuming after 16 images" in said
    assert not (tmp_path / "run/replaced-002").exists()
    seen = [line["seen"] for line in record_of(tmp_path / "run.jsonl")]
    assert seen == [0, 4, 0, 4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize(("exit_code", "tried"), [(65, False), (76, False), (1, True), (74, True), (75, True)])
def test_torchruns_restart_tries_again_only_what_may_go_better(train, tmp_path, monkeypatch, exit_code, tried):
    assert train(train__max_images=8)[0] == 0
    status = status_of(tmp_path / "run") | {"state": "failed", "exit_code": exit_code, "reason": "the first time"}
    (tmp_path / "run/status.json").write_text(json.dumps(status))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for _ in range(2):  # --max-restarts=2
        code, said = train()
        if tried:
            assert code == 0
        else:
            assert code == exit_code
            assert said.splitlines()[-1] == "train.py: error: not tried again: the first time"
            status = status_of(tmp_path / "run")
            assert (status["state"], status["exit_code"]) == ("failed", exit_code)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train()[0] == 0, "the command given anew is tried"


def test_what_ends_a_run_early_is_in_its_status_with_a_line_for_the_rank(train, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_FAULT", "exception:0:3")
    with pytest.raises(RuntimeError, match="a fault on purpose at step 3"):
        train()
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].startswith("rank 0 on ")
    assert status["reason"].endswith("RuntimeError: a fault on purpose at step 3")
    (failure,) = rows(tmp_path / "run/failures.jsonl")
    assert (failure["rank"], failure["exit_code"], failure["lost_peer"]) == (0, 1, False)
    assert "exception" not in json.dumps(failure["error"])
    assert "faults.py" in failure["traceback"]
    monkeypatch.delenv("DCGAN_FAULT")
    assert train()[0] == 0
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["reason"]) == ("finished", 0, "all images seen")


def test_a_fault_that_is_not_understood_is_told_before_anything_is_made(train, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_FAULT", "cough:0:3")
    code, said = train()
    assert code == 2
    assert "DCGAN_FAULT must be kind:rank:step" in said
    assert not (tmp_path / "run").exists()
