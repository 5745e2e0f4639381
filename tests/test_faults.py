"""What a week on a cluster does to a run, done to the real command: killed, stopped, starved, told to go.

Two gloo ranks each.  The rows are those of docs/faults.md; rows that need no process of their own are tested where the
part is (test_checkpoint.py, test_watch.py, ...), those that need root in test_faults_system.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import checkpoint as checkpoints
from tests.commands import (
    BATCH,
    ENDLESS,
    ROOT,
    assert_bit_equal,
    checkpoints_of,
    children_of,
    command,
    free_port,
    left_of,
    make_workspace,
    partials,
    rows,
    started,
    state_of,
    status_of,
    train,
    trainer_words,
    wait_for,
    wait_for_images,
    workers_of,
    wrapped,
)

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("faults"))
    train(folder, "clean", 2)
    return folder


def assert_ends_like_clean(workspace: Path, run: str) -> None:
    """The same command goes on and ends with the weights of the run that nobody touched."""
    said = train(workspace, run, 2).stderr
    assert "resuming after" in said
    assert_bit_equal(state_of(workspace / run), state_of(workspace / "clean"))


def test_row_1_a_killed_rank_is_restarted_from_the_last_checkpoint(workspace):
    words = command(workspace, "row1", 2, launcher=("--max-restarts=1",))
    with started(words, workspace / "row1.log", DCGAN_FAULT="kill:1:33") as process:
        assert process.wait(200) == 0
    assert "resuming after" in (workspace / "row1.log").read_text()
    assert_bit_equal(state_of(workspace / "row1"), state_of(workspace / "clean"))
    (failure,) = rows(workspace / "row1/failures.jsonl")
    assert (failure["rank"], failure["lost_peer"]) == (0, True)


def test_row_2_an_exception_in_rank_1_is_named_as_the_root_cause(workspace):
    error_file = workspace / "row2.json"
    environment = {"DCGAN_FAULT": "exception:1:10", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    with started(command(workspace, "row2", 2), workspace / "row2.log", **environment) as process:
        assert process.wait(200) == 1
    message = json.loads(error_file.read_text())["message"]
    assert "a fault on purpose at step 10" in message["message"]
    status = status_of(workspace / "row2")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].startswith("rank 1 on ")
    assert "RuntimeError: a fault on purpose at step 10" in status["reason"]
    assert "rank      : 1" in (workspace / "row2.log").read_text().split("Root Cause")[1]


def test_row_3_a_stopped_rank_ends_the_run_by_time_out(workspace):
    run = workspace / "row3"
    words = command(workspace, "row3", 2, *ENDLESS, "--distributed.step_timeout_s", "3")
    with started(words, workspace / "row3.log", DCGAN_FAULT="stop:1:10") as process:
        wait_for_images(run, 64, process)
        start = time.monotonic()
        assert process.wait(200) == 1
        # 3 s until the other rank gives up; torchrun then grants the stopped one 30 s before it kills it.
        assert time.monotonic() - start < 60
    assert not left_of(run)
    status = status_of(run)
    assert status["state"] == "failed"
    assert "lost another rank" in status["reason"]


def test_row_4_sigterm_saves_and_stops_all_ranks_at_one_step_and_the_wrapper_says_75(workspace):
    run = workspace / "row4"
    with started(wrapped(workspace, "row4", 2, *ENDLESS), workspace / "row4.log") as process:
        wait_for_images(run, 96, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert not left_of(run)
    status = status_of(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("preempted", "SIGTERM", 75)
    newest = checkpoints_of(run)[-1]
    assert newest == status["images_seen"]
    assert len(checkpoints.load(checkpoints.verify(checkpoints.folder_of(run, newest)))["rank_buffers"]) == 2
    assert "stopped by SIGTERM" in (workspace / "row4.log").read_text()
    # On from there to 80 images more, against a run that went there in one piece.
    end = newest + 10 * BATCH
    train(workspace, "row4", 2, "--train.max_images", str(end))
    train(workspace, "row4-whole", 2, "--train.max_images", str(end), "--log.grid_every_images", "0")
    assert_bit_equal(state_of(run, end), state_of(workspace / "row4-whole", end))


def test_row_6_sigterm_during_a_save_leaves_whole_checkpoints_only(workspace):
    run = workspace / "row6"
    words = wrapped(workspace, "row6", 2, *ENDLESS, "--checkpoint.every_images", "160")
    with started(words, workspace / "row6.log", DCGAN_FAULT="slow-write:0:0") as process:
        wait_for(lambda: list(partials(run)), "a checkpoint half written", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    found = checkpoints_of(run)
    assert found[0] == 160, "the one that was being written is whole"
    assert found[-1] == status_of(run)["images_seen"]
    assert not partials(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_7_a_second_sigterm_ends_it_at_once(workspace, ranks):
    run = workspace / f"row7-{ranks}"
    words = (wrapped if ranks > 1 else command)(
        workspace, run.name, ranks, *ENDLESS, "--checkpoint.every_images", "160"
    )
    with started(words, workspace / f"{run.name}.log") as process:
        wait_for(lambda: checkpoints.folders(run), "a first checkpoint", process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    with started(words, workspace / f"{run.name}.log", DCGAN_FAULT="slow-write:0:0") as process:
        before = checkpoints_of(run)[-1]
        wait_for(lambda: list(partials(run)), "a checkpoint half written", process)
        process.send_signal(signal.SIGTERM)
        first = time.monotonic()
        wait_for(lambda: time.monotonic() - first > 1.2, "a moment, so that it is no repetition", process)
        process.send_signal(signal.SIGTERM)
        second = time.monotonic()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - second < 2
        wait_for(lambda: not left_of(run), "every rank is gone")
        assert time.monotonic() - second < 2
    assert checkpoints_of(run)[-1] == before


@pytest.mark.parametrize("launcher", ["wrapper", "torchrun"])
def test_row_8_sigusr1_to_the_agent_saves_and_leaves_no_orphan(workspace, launcher):
    run = workspace / f"row8-{launcher}"
    words = (wrapped if launcher == "wrapper" else command)(workspace, run.name, 2, *ENDLESS)
    with started(words, workspace / f"{run.name}.log") as process:
        wait_for_images(run, 64, process)
        process.send_signal(signal.SIGUSR1)
        # torchrun alone does not know this signal and dies of it; its workers then stop as if told to.
        assert process.wait(60) == (75 if launcher == "wrapper" else -signal.SIGUSR1)
        wait_for(lambda: not left_of(run), "every rank is gone")
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert status["reason"] == ("SIGUSR1" if launcher == "wrapper" else "SIGTERM")
    assert checkpoints_of(run)[-1] == status["images_seen"]


def test_workers_whose_agent_is_killed_save_and_stop(workspace):
    run = workspace / "agentless"
    with started(command(workspace, "agentless", 2, *ENDLESS), workspace / "agentless.log") as process:
        wait_for_images(run, 64, process)
        assert len(workers_of(process.pid)) == 2
        process.kill()
        wait_for(lambda: not left_of(run), "every rank is gone")
    assert status_of(run)["state"] == "preempted"
    assert checkpoints_of(run)[-1] == status_of(run)["images_seen"]


def test_sigterm_before_the_first_worker_is_a_preemption_too(workspace):
    with started(wrapped(workspace, "early", 2, *ENDLESS), workspace / "early.log") as process:
        wait_for(lambda: children_of(process.pid), "torchrun is there", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        wait_for(lambda: not left_of(workspace / "early"), "every rank is gone")


def test_row_9_a_survivor_told_to_stop_does_not_save_with_a_dead_peer(workspace):
    """Without torchrun, which would time its signals otherwise: SIGTERM to one, while the other dies in a step."""
    run = workspace / "row9"
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, *trainer_words(workspace, "row9", *ENDLESS, "--checkpoint.every_images", "0")]

    def rank(number: int, **environment: str):
        place = {"RANK": str(number), "LOCAL_RANK": str(number)}
        return started(words, workspace / f"row9-{number}.log", **shared, **place, **environment)

    # Rank 1 stops in its tracks, so that rank 0 waits for it inside a collective when the signal comes.
    with rank(0) as survivor, rank(1, DCGAN_FAULT="stop:1:20") as peer:
        wait_for(lambda: "T (stopped)" in Path(f"/proc/{peer.pid}/status").read_text(), "rank 1 has stopped", peer)
        survivor.send_signal(signal.SIGTERM)
        peer.kill()
        start = time.monotonic()
        code = survivor.wait(60)
        assert time.monotonic() - start < 5
    assert code == 1
    assert not (run / "checkpoints").exists() or not checkpoints.folders(run), "no save without the other rank"
    assert status_of(run)["state"] == "failed"


def test_row_17_a_run_folder_that_cannot_be_written_fails_before_training(workspace):
    words = command(workspace, "row17", 2)
    words[words.index("--run.dir") + 1] = "/proc/dcgan-run"  # read-only even for root
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    # The bound is 10 s after the process group has started; the imports before it are in here as well.
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert done.stderr.count("train.py: error: cannot write the run folder /proc/dcgan-run") == 1
    assert "exitcode  : 74" in done.stderr


def test_row_27_a_slow_rank_is_named(workspace):
    run = workspace / "row27"
    environment = {"DCGAN_FAULT": "slow-from:1:4"}
    with started(
        command(workspace, "row27", 2, "--train.max_images", "160"), run.with_suffix(".log"), **environment
    ) as p:
        assert p.wait(200) == 0
    said = [line for line in run.with_suffix(".log").read_text().splitlines() if line.startswith("slow: ")]
    assert said
    assert f"rank 1 on {socket.gethostname()}" in said[0]
    assert said[0] in [event["text"] for event in status_of(run)["events"]]


def test_row_29_random_kills_never_change_how_it_ends():
    words = [sys.executable, "-m", "tests.soak", "--kills", "8"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills, seed 0" in done.stdout


def test_a_time_limit_leaves_as_a_preemption_and_the_same_command_goes_on(workspace):
    run = workspace / "limit"
    words = wrapped(workspace, "limit", 2, "--train.max_minutes", "0.0001")
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75, done.stderr
    assert status_of(run)["reason"] == "train.max_minutes"
    assert 0 < status_of(run)["images_seen"] < 400
    assert_ends_like_clean(workspace, "limit")
