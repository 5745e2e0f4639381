"""The command itself, as a user types it: train, kill, the same command again; one rank and several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands import (
    IMAGES,
    ROOT,
    assert_bit_equal,
    command,
    make_workspace,
    rows,
    state_of,
    train,
    train_and_kill,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("train"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_step_the_same_command_ends_with_the_same_weights(workspace, ranks):
    whole, broken = f"whole{ranks}", f"broken{ranks}"
    train(workspace, whole, ranks)
    train_and_kill(workspace, broken, ranks, images=100 + 64 * ranks)
    said = train(workspace, broken, ranks).stderr
    assert "resuming after" in said
    assert "layout differs" not in said
    assert "changed since" not in said
    assert_bit_equal(state_of(workspace / broken), state_of(workspace / whole))
    kept = [rows(workspace / run / "stats.jsonl") for run in (whole, broken)]
    assert [r["images_seen"] for r in kept[1]] == [r["images_seen"] for r in kept[0]] == list(range(16, 401, 16))
    losses = [[(r["loss_d"], r["loss_g"]) for r in run] for run in kept]
    assert losses[0] == losses[1]
    state = state_of(workspace / whole)
    assert len(state["rank_buffers"]) == ranks
    if ranks == 2:
        assert not torch.equal(*state["rank_buffers"]), "each rank has statistics of its own images"


def test_a_run_leaves_what_people_look_at_and_says_when_it_is_finished(workspace):
    run = workspace / "whole1"
    if not run.exists():
        train(workspace, "whole1")
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    assert (status["exit_code"], status["images_seen"]) == (0, 400)
    assert Path(status["checkpoint"]).name == "images-000000400"
    fakes = [f"fakes-{n:09d}.png" for n in (0, 80, 160, 240, 320, 400)]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [*fakes, "reals.png"]
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_images"] == 400
    assert {"command", "commit", "hardware", "versions"} <= json.loads((run / "env.json").read_text()).keys()
    needed = {"images_seen", "loss_d", "loss_g", "images_per_s", "d_real", "d_fake_before", "data_wait_percent"}
    assert all(needed <= row.keys() for row in rows(run / "stats.jsonl"))
    assert len(list((run / "checkpoints").iterdir())) == 3

    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    again = train(workspace, "whole1").stderr
    assert "this run is finished" in again
    assert "train.max_images" in again
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before

    # More images: it goes on, and says which setting changed.
    more = train(workspace, "whole1", 1, "--train.max_images", "416", "--data.workers", "2").stderr
    assert "train.max_images 400 -> 416" in more
    assert "resuming after 400 images" in more

    # Another model, or begin anew.
    refused = subprocess.run(
        command(workspace, "whole1", 1, "--model.ngf", "8"), capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert refused.stderr.count("model.ngf is 8, but the checkpoint") == 1
    assert "Traceback" not in refused.stderr


def test_a_dry_run_tells_sizes_and_steps_and_writes_no_run(workspace):
    arguments = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(ROOT / "configs/celeba64.yaml")]
    arguments += [
        "--data.dataroot",
        str(workspace / "faces"),
        "--data.cache_dir",
        str(workspace / "cache"),
        "--dry-run",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=workspace)
    assert done.returncode == 0, done.stderr
    for part in (
        "3,576,704",
        "2,765,568",
        "2,274.6 MFLOP",
        f"{IMAGES} images an epoch",
        "memory a rank",
        "batch_size: 128",
    ):
        assert part in done.stdout, part
    assert not (workspace / "runs").exists()
