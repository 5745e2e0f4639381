"""launch/slurm/train.sbatch under a real Slurm of two nodes on this machine.

Both nodes share the machine's host name.  Hosts keep their caches by name, so here each node gets a cache folder of its
own, by an interpreter that is a small script, as sites with modules or containers have it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import slurm_cluster
from tests.commands import (
    BATCH,
    ENDLESS,
    ROOT,
    assert_bit_equal,
    left_of,
    make_workspace,
    rows,
    state_of,
    status_of,
    train,
    trainer_words,
    wait_for,
)
from tests.slurm_cluster import Cluster

SCRIPT = ROOT / "launch/slurm/train.sbatch"


@pytest.fixture
def cluster(tmp_path):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.running(tmp_path / "slurm") as found:
        yield found
    assert not slurm_cluster.processes_of(found)


@pytest.fixture
def workspace(tmp_path):
    folder = make_workspace(tmp_path)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexport XDG_CACHE_HOME={folder}/cache.$SLURMD_NODENAME\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def submit(cluster: Cluster, workspace: Path, run: str, *options: str, sbatch: tuple[str, ...]) -> str:
    """The job of a training into a run folder, its output in RUN.log."""
    _, *words = trainer_words(workspace, run, "--data.cache_dir", "", *options)
    environment = {"PYTHON": str(workspace / "python")}
    return cluster.submit(*sbatch, str(SCRIPT), *words, log=workspace / f"{run}.log", **environment)


def set_max_images(workspace: Path, images: int) -> None:
    path = workspace / "tiny.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["train"]["max_images"] = images
    path.write_text(yaml.safe_dump(settings))


def images_in(run: Path) -> int:
    """Images seen by the last row of stats.jsonl; 0: there is none."""
    found = rows(run / "stats.jsonl") if (run / "stats.jsonl").exists() else []
    return found[-1]["images_seen"] if found else 0


def wait_until_done(cluster: Cluster, job: str) -> dict[str, str]:
    return cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.mark.system
def test_the_time_limit_saves_and_requeues_and_the_same_job_ends_like_an_unbroken_run(cluster, workspace):
    set_max_images(workspace, 80_000_000)
    # Slurm may send the signal up to a minute early: it comes half a minute to a minute and a half after the start.
    limit = ("--nodes=2", "--time=2", "--signal=B:USR1@30")
    quiet = ("--log.grid_every_images", "0", "--log.every_steps", "100")
    job = submit(cluster, workspace, "limited", *quiet, sbatch=limit)
    wait_for(lambda: cluster.fields(job)["Restarts"] == "1", f"job {job} goes back to the queue")
    run, log = workspace / "limited", workspace / "limited.log"
    status = status_of(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("preempted", "SIGUSR1", 75), log.read_text()
    saved = status["images_seen"]
    assert saved >= BATCH
    wait_for(lambda: not left_of(run), "nothing trains while the job waits in the queue")

    set_max_images(workspace, saved + 10 * BATCH)
    wait_for(lambda: cluster.fields(job)["JobState"] == "PENDING", f"job {job} waits")
    cluster.start_soon(job)
    done = wait_until_done(cluster, job)
    assert (done["JobState"], done["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    said = log.read_text()
    assert f"train.sbatch: preempted; job {job} goes back to the queue" in said
    assert f"train.sbatch: job {job}, start 2, on n[1-2], meeting at 127.0.0.1:" in said
    assert f"resuming after {saved} images" in said
    assert status_of(run)["world_size"] == 2

    train(workspace, "whole", 2, *quiet)
    images = saved + 10 * BATCH
    assert_bit_equal(state_of(run, images), state_of(workspace / "whole", images))


@pytest.mark.system
def test_an_array_trains_each_seed_in_a_folder_of_its_own_and_requeues_only_the_one_that_was_stopped(
    cluster, workspace
):
    set_max_images(workspace, 80_000_000)
    array = submit(cluster, workspace, "seeds", sbatch=("--array=3-4", "--nodes=1", "--cpus-per-task=1", "--time=10"))
    folders = {seed: workspace / f"seeds-seed-{seed}" for seed in (3, 4)}
    wait_for(lambda: all(images_in(folder) >= 4 * BATCH for folder in folders.values()), "both train")
    for seed, folder in folders.items():
        assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["seed"] == seed
    # The last task bears the array's own number, and that number alone would mean both.
    assert cluster.fields(f"{array}_4")["JobId"] == array
    cluster.said_by("scancel", "--signal=USR1", "--batch", f"{array}_4")
    wait_for(lambda: cluster.fields(f"{array}_4")["Restarts"] == "1", "the stopped one goes back to the queue")
    assert status_of(folders[4])["state"] == "preempted"
    before = images_in(folders[3])
    wait_for(lambda: images_in(folders[3]) > before, "the other one goes on")
    assert (cluster.fields(f"{array}_3")["JobState"], cluster.fields(f"{array}_3")["Restarts"]) == ("RUNNING", "0")


@pytest.mark.system
def test_scancel_saves_but_does_not_requeue_and_a_wrong_setting_ends_the_job_with_2(cluster, workspace):
    wrong = submit(cluster, workspace, "wrong", "--model.ngf", "0", sbatch=("--nodes=2", "--time=5"))
    done = wait_until_done(cluster, wrong)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "2:0", "0")
    assert "model.ngf must be at least 1, got 0" in (workspace / "wrong.log").read_text()

    job, run = submit(cluster, workspace, "stopped", *ENDLESS, sbatch=("--nodes=2", "--time=5")), workspace / "stopped"
    wait_for(lambda: images_in(run) >= 4 * BATCH, "it trains")
    cluster.said_by("scancel", job)
    wait_for(lambda: not left_of(run), "all ranks are gone")
    assert status_of(run)["state"] == "preempted"
    assert wait_until_done(cluster, job)["JobState"] == "CANCELLED"
    assert "goes back to the queue" not in (workspace / "stopped.log").read_text()


def test_the_script_says_in_one_line_that_it_wants_sbatch_and_the_clone(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    for environment, rule in (({}, "start it with sbatch"), ({"SLURM_JOB_ID": "1"}, "submit from the clone")):
        done = subprocess.run(
            [bash, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"train.sbatch: error: {rule}")
        assert done.stderr.count("\n") == 1
