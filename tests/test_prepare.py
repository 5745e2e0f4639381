"""launch/prepare.py: one line and an exit code for each kind of bad input, and zips that training reads."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli.prepare import main
from pipeline.config import DataConfig
from pipeline.index import open_dataset
from tests.images import bad_images, jpeg_bytes, odd_images, portrait

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    code = main([str(argument) for argument in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prepare.py: error: ")
    return code, line


def test_bad_datasets_end_with_65_and_one_line_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    bad = bad_images(tmp_path / "bad")
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        archive.writestr("a.jpg", b"x" * 5000)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes()[:3000])
    with zipfile.ZipFile(tmp_path / "outside.zip", "w") as archive:
        archive.writestr("../a.jpg", b"x")
    rows = {
        "missing": "does not exist",
        "empty": "holds no image files",
        "bad": f"none of its {len(bad)} files is a readable image: empty.jpg is empty",
        "cut.zip": "cut short",
        "outside.zip": "../a.jpg has a path outside the archive",
    }
    for name, rule in rows.items():
        code, line = fails(capsys, "index", tmp_path / name)
        assert code == 65
        assert f"{tmp_path / name}: " in line
        assert rule in line


def test_each_bad_file_alone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in bad_images(tmp_path / "all").items():
        (tmp_path / name).mkdir()
        path.rename(tmp_path / name / path.name)
        for options in ((), ("--strict",)):
            code, line = fails(capsys, "index", tmp_path / name, *options)
            assert code == 65
            assert path.name in line


def test_bad_command_lines_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd_images(tmp_path / "set")
    (tmp_path / "there.zip").touch()
    rows = [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["index"], "PATH"),
        (["index", ""], "PATH"),
        (["index", tmp_path / "set", "--str"], "--str"),
        (["faces", tmp_path / "faces", "--count", "0"], "--count"),
        (["faces", tmp_path / "faces", "--seed", "-1"], "--seed"),
        (["pack", tmp_path / "set", tmp_path / "there.zip"], "--force"),
        (["pack", tmp_path / "set", tmp_path / "out.rar"], ".zip"),
        (["torchvision", "CelebB", tmp_path / "out.zip"], "CelebA, CIFAR10"),
        (["torchvision", "MNIST", tmp_path / "out.zip", "--split", "valid"], "--split"),
    ]
    for argv, named in rows:
        code, line = fails(capsys, *argv)
        assert code == 2, line
        assert named in line


def test_index_says_what_is_there_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = odd_images(tmp_path / "set"), bad_images(tmp_path / "set")
    assert main(["index", str(tmp_path / "set"), "--full"]) == 0
    out = capsys.readouterr().out
    fingerprint = open_dataset(DataConfig(dataroot=str(tmp_path / "set"))).fingerprint
    assert f"{len(good)} images, {len(bad)} files left out" in out
    assert "median 80 x 96" in out
    assert fingerprint in out
    assert "left out: text.jpg is neither JPEG nor PNG" in out


def test_pack_makes_the_same_zip_with_the_fingerprint_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "below").mkdir(parents=True)
    good = odd_images(tmp_path / "set" / "below")
    bad_images(tmp_path / "set")
    for name in ("1.zip", "2.zip"):
        assert main(["pack", str(tmp_path / "set"), str(tmp_path / name)]) == 0
    assert "left out: empty.jpg is empty" in capsys.readouterr().out
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    packed = open_dataset(DataConfig(dataroot=str(tmp_path / "1.zip")))
    assert len(packed) == len(good)
    assert not packed.index.rejected
    assert packed.fingerprint == open_dataset(DataConfig(dataroot=str(tmp_path / "set"))).fingerprint
    assert main(["pack", str(tmp_path / "2.zip"), str(tmp_path / "1.zip"), "--force"]) == 0
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


def test_a_failed_pack_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_images(tmp_path / "bad")
    odd_images(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    assert fails(capsys, "pack", tmp_path / "bad", tmp_path / "out.zip")[0] == 65

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    code, line = fails(capsys, "pack", tmp_path / "set", tmp_path / "out.zip")
    assert code == 74
    assert f"{tmp_path / 'out.zip'}: cannot be written (No space left on device)" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_torchvision_sets_become_stored_zips_of_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fake.zip"
    assert main(["torchvision", "FakeData", str(out), "--count", "5"]) == 0
    dataset = open_dataset(DataConfig(dataroot=str(out)))
    assert [dataset.key(i) for i in range(len(dataset))] == [f"train/{i:06d}.png" for i in range(5)]
    assert dataset.size(0) == (64, 64)
    code, line = fails(capsys, "torchvision", "MNIST", tmp_path / "m.zip", "--no-download", "--root", tmp_path / "none")
    assert code == 65
    assert "MNIST: is not below" in line
    assert not (tmp_path / "m.zip").exists()


def test_celeba_by_hand_needs_only_its_zip_and_keeps_its_bytes(tmp_path: Path) -> None:
    faces = {f"{i:06d}.jpg": jpeg_bytes(Image.fromarray(portrait()), quality=80 + i) for i in range(1, 5)}
    base = tmp_path / "root" / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    for name, data in faces.items():
        (base / "img_align_celeba" / name).write_bytes(data)
    command = ["torchvision", "CelebA", "--root", str(tmp_path / "root"), "--no-download"]
    assert main([*command, str(tmp_path / "folder.zip")]) == 0
    with zipfile.ZipFile(base / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in faces.items():
            archive.writestr(f"img_align_celeba/{name}", data)
    assert main([*command, str(tmp_path / "zip.zip")]) == 0
    assert (tmp_path / "zip.zip").read_bytes() == (tmp_path / "folder.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            f"img_align_celeba/{name}": data for name, data in faces.items()
        }
    assert main([*command, str(tmp_path / "two.zip"), "--count", "2"]) == 0
    assert len(open_dataset(DataConfig(dataroot=str(tmp_path / "two.zip")))) == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("File not found or corrupted."), 74, "Google Drive allows only so many downloads"),
        (OSError("<urlopen error [Errno -3]\nTemporary failure in name resolution>"), 74, "Temporary failure"),
        (RuntimeError("You can install it with 'pip install gdown'."), 1, "pip install gdown"),
    ],
)
def test_a_failed_celeba_download_says_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    said: str,
) -> None:
    def fetch(*_: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", fetch)
    found, line = fails(capsys, "torchvision", "CelebA", tmp_path / "out.zip", "--root", tmp_path / "root")
    assert found == code
    assert said in line
    if code == 74:
        assert "img_align_celeba.zip" in line
        assert "data.dataroot" in line
    assert not (tmp_path / "out.zip").exists()


def test_the_script_runs_from_anywhere_as_a_user_types_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), "index", str(tmp_path / "nothing")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 65
    assert result.stderr == f"prepare.py: error: {tmp_path / 'nothing'}: does not exist\n"
    assert result.stdout == ""
