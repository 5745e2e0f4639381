"""The command itself, as a user types it: train, kill, the same command again; one rank and several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.face_set import write_faces

ROOT = Path(__file__).resolve().parent.parent
BATCH, IMAGES = 8, 40
SETTINGS = {
    "data": {"image_size": 16, "crop_margin": 2, "flip": True, "brightness": 0.1},
    "model": {"nz": 8, "ngf": 4, "ndf": 4},
    "train": {"batch_size": BATCH, "num_epochs": 1000, "max_images": 400},
    "checkpoint": {"every_images": 40},
    "log": {"every_steps": 2, "grid_every_images": 80, "grid_size": 4},
    "distributed": {"threads": 1},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_faces(folder / "faces", IMAGES, seed=1, workers=1)
    settings = SETTINGS | {"data": SETTINGS["data"] | {"cache_dir": str(folder / "cache")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(workspace: Path, run: str, ranks: int, *options: str) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = ["--config", str(workspace / "tiny.yaml"), "--data.dataroot", str(workspace / "faces")]
    return [*launcher, str(ROOT / "launch/train.py"), *paths, "--run.dir", str(workspace / run), *options]


def train(workspace: Path, run: str, ranks: int = 1, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(workspace, run, ranks, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def train_and_kill(workspace: Path, run: str, ranks: int, images: int) -> None:
    """Start the command and SIGKILL all of its processes once `images` images are in stats.jsonl."""
    stats = workspace / run / "stats.jsonl"
    with subprocess.Popen(command(workspace, run, ranks), stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if stats.exists() and any(row["images_seen"] >= images for row in rows(stats)):
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """torchrun gives each worker a session of its own: find them by parenthood."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    os.kill(pid, signal.SIGKILL)
    for child in children:
        if Path(f"/proc/{child}").exists():
            kill_tree(child)


def rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def final_state(workspace: Path, run: str) -> dict:
    return torch.load(workspace / run / "checkpoints/images-000000400/state.pt", weights_only=True)


def flat(value, prefix="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix: value}


def assert_bit_equal(one: dict, other: dict) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert equal, key


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_step_the_same_command_ends_with_the_same_weights(workspace, ranks):
    whole, broken = f"whole{ranks}", f"broken{ranks}"
    train(workspace, whole, ranks)
    train_and_kill(workspace, broken, ranks, images=100 + 64 * ranks)
    said = train(workspace, broken, ranks).stderr
    assert "resuming after" in said
    assert "layout differs" not in said
    assert "changed since" not in said
    assert_bit_equal(final_state(workspace, broken), final_state(workspace, whole))
    kept = [rows(workspace / run / "stats.jsonl") for run in (whole, broken)]
    assert [r["images_seen"] for r in kept[1]] == [r["images_seen"] for r in kept[0]] == list(range(16, 401, 16))
    losses = [[(r["loss_d"], r["loss_g"]) for r in run] for run in kept]
    assert losses[0] == losses[1]
    state = final_state(workspace, whole)
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
