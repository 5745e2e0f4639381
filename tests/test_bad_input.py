"""What a user may hand to launch/train.py by mistake: one line that names it, an exit code, no half-written run."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.cli import train as command
from pipeline.face_set import write_faces
from tests.images import bad_images

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--data.image_size", "16", "--model.nz", "4", "--model.ngf", "2", "--model.ndf", "2", "--train.batch_size", "4"]
TINY += ["--train.max_images", "8", "--distributed.threads", "1", "--log.grid_size", "4", "--data.workers", "1"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "faces"
    write_faces(folder, 6, workers=1)
    return folder


def train(folder: Path, dataroot: Path, *options: str) -> int:
    paths = [
        "--data.dataroot",
        str(dataroot),
        "--run.dir",
        str(folder / "run"),
        "--data.cache_dir",
        str(folder / "cache"),
    ]
    return command.main([*TINY, *paths, *options])


def cut_short(folder: Path, faces: Path) -> Path:
    path = folder / "cut.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for image in sorted(faces.glob("*.jpg")):
            archive.write(image, image.name)
    path.write_bytes(path.read_bytes()[:-500])
    return path


def leaves_the_archive(folder: Path, faces: Path) -> Path:
    path = folder / "escape.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(faces / "000000.jpg", "../../escaped.jpg")
    return path


def only_bad_images(folder: Path, _faces: Path) -> Path:
    (folder / "bad").mkdir()
    bad_images(folder / "bad")
    return folder / "bad"


def empty(folder: Path, _faces: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


CASES = [
    pytest.param(lambda folder, _: folder / "nowhere", "nowhere", id="missing path"),
    pytest.param(empty, "empty", id="empty folder"),
    pytest.param(only_bad_images, "bad", id="no readable image"),
    pytest.param(cut_short, "cut.zip", id="zip cut short"),
    pytest.param(leaves_the_archive, "escape.zip", id="path outside the archive"),
]


@pytest.mark.parametrize(("make", "named"), CASES)
def test_data_that_cannot_be_used_is_one_line_and_65(tmp_path, faces, capsys, make, named):
    assert train(tmp_path, make(tmp_path, faces)) == 65
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("train.py: error: ")
    assert named in said[-1]
    assert not any("Traceback" in line for line in said)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)
    assert named in status["reason"]
    assert not list((tmp_path / "run").rglob("*.png"))
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "escaped.jpg").exists()


def test_no_dataroot_is_a_setting_to_mend(tmp_path, capsys):
    assert command.main([*TINY, "--run.dir", str(tmp_path / "run")]) == 2
    assert "data.dataroot" in capsys.readouterr().err


def test_bad_files_among_good_ones_are_left_out_named_and_trained_around(tmp_path, faces, capsys, caplog):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    bad_images(mixed)
    for image in faces.glob("*.jpg"):
        (mixed / image.name).write_bytes(image.read_bytes())
    assert train(tmp_path, mixed) == 0
    said = capsys.readouterr().err
    assert "6 images" in said
    assert "files are left out: empty.jpg is empty, forged.jpg has 30000 x 30000 pixels" in caplog.text
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert train(tmp_path, mixed, "--data.strict", "true", "--run.dir", str(tmp_path / "strict")) == 65


# Starts its arguments as a command and prints its exit code and its peak memory in KiB.  In a process of its own: a
# child begins with the peak of the process that it is forked from, and that of pytest may be anything.
PEAK_OF = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(process.returncode, usage.ru_maxrss)
"""


def test_no_bad_file_makes_the_command_take_much_memory(tmp_path, faces):
    """The peak of resident memory of the real command, as the system gives it when it ends.

    About 940 MiB of it are interpreter, torch, DALI and the networks, bad files or none (CPU, 2026-11).  A decoder that
    believed the headers of forged.jpg and forged.png would add 2.7 GB for each.
    """
    mixed = tmp_path / "mixed"
    bad = bad_images(mixed)
    for image in sorted(faces.glob("*.jpg")):
        (mixed / image.name).write_bytes(image.read_bytes())
    garbled = bytearray((mixed / "000003.jpg").read_bytes())
    garbled[garbled.index(b"\xff\xc0") + 12] = 9  # a quantisation table that is not there, in a header that looks whole
    (mixed / "000003.jpg").write_bytes(garbled)
    places = {"data.dataroot": mixed, "run.dir": tmp_path / "run", "data.cache_dir": tmp_path / "cache"}
    options = [word for key, path in places.items() for word in (f"--{key}", str(path))]
    options += ["--data.cache", "host", "--data.max_bad_fraction", "0.5"]
    command = [sys.executable, "-c", PEAK_OF, sys.executable, str(ROOT / "launch/train.py"), *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    code, peak_kib = map(int, done.stdout.split()[-2:])
    assert code == 0, done.stderr
    assert peak_kib < 2_000_000
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["files_left_out"]) == ("finished", len(bad))
    rejected = next((tmp_path / "cache").rglob("rejected.txt")).read_text()
    assert sorted(line.split("\t")[0] for line in rejected.splitlines()) == sorted(path.name for path in bad.values())
    replaced = json.loads(next((tmp_path / "cache").glob("decoded-*.json")).read_text())["replaced"]
    assert [key for key, _ in replaced] == ["000003.jpg"]


def test_a_run_refuses_other_settings_and_other_data(tmp_path, faces, capsys):
    assert train(tmp_path, faces) == 0
    status = (tmp_path / "run/status.json").read_text()
    weights = tmp_path / "run/checkpoints/images-000000008/state.pt"
    before = weights.read_bytes()
    capsys.readouterr()
    for option, value in (("--data.image_size", "32"), ("--model.ndf", "3"), ("--run.seed", "1"), ("--data.nc", "1")):
        assert train(tmp_path, faces, option, value) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert option[2:] in said
        assert "images-000000008" in said
        # Networks of another shape cannot be loaded, forced or not.
        assert ("--run.force true goes on" in said) == (option == "--run.seed")
    assert (tmp_path / "run/status.json").read_text() == status

    other = tmp_path / "other"
    write_faces(other, 5, seed=1, workers=1)
    assert train(tmp_path, other) == 65
    said = capsys.readouterr().err
    assert "fingerprint" in said
    assert str(other) in said
    assert weights.read_bytes() == before
    assert train(tmp_path, other, "--run.force", "true", "--train.max_images", "12") == 0
    assert "run.force" in capsys.readouterr().err


def test_a_run_begins_from_the_weights_of_another(tmp_path, faces, capsys):
    assert train(tmp_path, faces) == 0
    begun = ["--run.dir", str(tmp_path / "second"), "--run.init_from", str(tmp_path / "run")]
    assert train(tmp_path, faces, *begun, "--optim.lr", "1e-30", "--train.max_images", "4") == 0
    assert "counters at zero" in capsys.readouterr().err
    states = [
        torch.load(tmp_path / path / "state.pt", weights_only=True)["generator"]["layers.0.weight"]
        for path in ("run/checkpoints/images-000000008", "second/checkpoints/images-000000004")
    ]
    assert torch.equal(*states)


def test_begin_anew_puts_the_old_run_aside(tmp_path, faces, capsys):
    assert train(tmp_path, faces) == 0
    assert train(tmp_path, faces, "--run.resume", "none", "--train.max_images", "4") == 0
    assert (tmp_path / "run/replaced-001/checkpoints/images-000000008/state.pt").exists()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["images-000000004"]
    named = tmp_path / "run/replaced-001/checkpoints/images-000000008"
    assert train(tmp_path, faces, "--run.resume", str(named), "--train.max_images", "12") == 0
    assert (tmp_path / "run/checkpoints/images-000000012").exists()
    capsys.readouterr()
    assert train(tmp_path, faces, "--run.resume", str(named), "--train.max_images", "16") == 0
    assert "resuming after 12 images" in capsys.readouterr().err, "the same command goes on, not back to its beginning"


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_the_same_command(tmp_path, faces, capsys):
    assert train(tmp_path, faces) == 0
    status = tmp_path / "run/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running", "exit_code": None}))
    (tmp_path / "run/report.html").unlink()
    capsys.readouterr()
    assert train(tmp_path, faces) == 0
    assert "this run is finished: 8 images seen, train.max_images is 8" in capsys.readouterr().err
    found = json.loads(status.read_text())
    assert (found["state"], found["exit_code"], found["images_seen"]) == ("finished", 0, 8)
    assert (tmp_path / "run/report.html").exists()


def test_a_damaged_newest_checkpoint_steps_aside_and_the_one_before_goes_on(tmp_path, faces, capsys):
    assert train(tmp_path, faces, "--checkpoint.every_images", "4") == 0
    weights = tmp_path / "run/checkpoints/images-000000008/state.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train(tmp_path, faces) == 0
    said = capsys.readouterr().err
    assert "state.pt does not match its manifest" in said
    assert "resuming after 4 images" in said
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["images-000000004", "images-000000008", "images-000000008.abandoned"]


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_checkpoint_path_that_holds_none_is_74(tmp_path, faces, capsys, path):
    (tmp_path / "empty").mkdir()
    assert train(tmp_path, faces, "--run.resume", str(tmp_path / path)) == 74
    assert str(tmp_path / path) in capsys.readouterr().err


def test_a_run_folder_that_is_a_file_is_refused(tmp_path, faces, capsys):
    (tmp_path / "run").write_text("")
    assert train(tmp_path, faces) == 2
    assert "run.dir must be a folder" in capsys.readouterr().err
