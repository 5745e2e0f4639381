"""launch/evaluate.py: its table, its line in the run's folder, what it chooses, and what it refuses with which code."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint_writer import mark_best
from pipeline.cli.evaluate import main, table
from pipeline.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig
from pipeline.environment import versions
from pipeline.face_set import write_faces
from pipeline.index import open_dataset
from pipeline.metrics.inception import SOURCE
from pipeline.models import Generator
from tests.commands import ROOT, rows

PHOTOGRAPHS = 20


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "faces"
    write_faces(folder, PHOTOGRAPHS, seed=1, workers=1)
    return folder


def write_run(folder: Path, photographs: Path, cache: Path, **sections: object) -> Path:
    """A run with the checkpoints of 40 and 80 images; in each, G and its average differ."""
    plain = {
        "data": DataConfig(dataroot=str(photographs), cache_dir=str(cache), image_size=16, decoder="pillow"),
        "model": ModelConfig(nz=8, ngf=4, ndf=4),
        "eval": EvalConfig(num_images=12, every_images=40, metrics=["ms_ssim", "swd"]),
    }
    cfg = Config(**plain | sections)
    manifest = {"identity": {"dataset": open_dataset(cfg.data).fingerprint}}
    for images in (40, 80):
        torch.manual_seed(images)
        generator = Generator(8, 4, cfg.data.nc, 16, 16)
        for parameter in generator.parameters():
            nn.init.normal_(parameter, 0.0, 0.4)
        average = {name: value.detach() * 0.7 for name, value in generator.named_parameters()}
        state = {"generator": generator.state_dict(), "ema": average if cfg.optim.ema_half_life_images else {}}
        checkpoint.write(folder, state, yaml.safe_dump(dataclasses.asdict(cfg)), manifest | {"images_seen": images})
    return folder


@pytest.fixture
def run(tmp_path: Path, photographs: Path) -> Path:
    return write_run(tmp_path / "run", photographs, tmp_path / "cache")


def evaluated(run: Path, *options: str) -> dict:
    """The line that a call which went well has appended."""
    before = rows(run / "evaluations.jsonl") if (run / "evaluations.jsonl").exists() else []
    assert main([str(run), *options]) == 0
    after = rows(run / "evaluations.jsonl")
    assert after[:-1] == before
    return after[-1]


def refused(run: Path, capfd: pytest.CaptureFixture[str], code: int, *options: str) -> str:
    """The one line of a call that fails with this code, and leaves nothing."""
    assert main([str(run), *options]) == code
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("evaluate.py: error: ")
    assert not (run / "evaluations.jsonl").exists()
    return line


def test_the_table_and_the_line_say_the_figures_and_what_they_compare_with(run, capfd):
    row = evaluated(run)
    out = capfd.readouterr().out.splitlines()
    assert (row["checkpoint"], row["images_seen"], row["weights"]) == ("images-000000080", 80, "ema")
    assert (row["num_images"], row["decoder"], row["extractor"]) == (12, "pillow", "")
    assert row["crop"] == "short side resized to 16, middle 16 x 16 cut out"
    assert row["resize"] == "linear with antialias"
    assert row["versions"] == versions()
    assert row["swd"] == row["swd_16"] > 1
    assert 0 < row["ms_ssim"] < 1
    assert 0 < row["ms_ssim_real"] < 1
    assert out[:6] == [
        "metric                value  better is",
        f"swd              {row['swd']:>10.4f}  lower",
        f"  swd_16         {row['swd_16']:>10.4f}",
        f"ms_ssim          {row['ms_ssim']:>10.4f}  lower",
        f"  ms_ssim_real   {row['ms_ssim_real']:>10.4f}",
        "",
    ]
    for fact in (
        "12 generated images, 12 of 20 photographs",
        row["crop"],
        row["resize"],
        "images-000000080, ema weights",
    ):
        assert any(fact in line for line in out[6:]), fact


def test_a_figure_that_is_none_is_a_dash_and_other_metrics_have_their_place():
    facts = {"num_images": 2, "real": "2 of 2", "crop": "c", "resize": "r", "decoder": "d", "extractor": "inception-x"}
    facts |= {"checkpoint": "images-000000001", "weights": "live", "images_seen": 1, "seconds": 1.0, "ranks": 1}
    lines = table({"kid": 0.5, "kid_std": 0.25, "inception_score": None, "inception_score_std": None} | facts)
    assert [line.split() for line in lines[1:3]] == [["kid", "0.5000", "lower"], ["kid_std", "0.2500"]]
    assert [line.split() for line in lines[3:5]] == [["inception_score", "-", "higher"], ["inception_score_std", "-"]]
    assert any("inception-x" in line for line in lines[5:])


def test_the_same_call_gives_the_same_figures_and_each_option_another_evaluation(run):
    swd = evaluated(run, "--metrics", "swd")["swd"]
    assert evaluated(run, "--metrics", "swd")["swd"] == swd
    for options in (
        ["--weights", "live"],
        ["--num", "11"],
        ["--checkpoint", str(run / "checkpoints/images-000000040")],
    ):
        row = evaluated(run, "--metrics", "swd", *options)
        assert row["swd"] != swd, options
        assert "ms_ssim" not in row
    assert evaluated(run, "--metrics", "swd", "--batch", "5")["swd"] == pytest.approx(swd, rel=0.01)  # pixels may round


def test_the_best_is_taken_where_one_is_marked_and_asked_for_or_nothing_is(run, capfd):
    assert "no checkpoint as its best" in refused(run, capfd, 74, "--checkpoint", "best")
    mark_best(run, run / "checkpoints/images-000000040")
    assert evaluated(run)["images_seen"] == 40
    assert evaluated(run, "--checkpoint", "best")["images_seen"] == 40
    assert evaluated(run, "--checkpoint", "last")["images_seen"] == 80


def test_a_run_without_an_average_is_measured_as_it_is_and_says_so(tmp_path, photographs):
    bare = OptimConfig(ema_half_life_images=0)
    run = write_run(tmp_path / "bare", photographs, tmp_path / "cache", optim=bare)
    assert evaluated(run, "--metrics", "swd")["weights"] == "live"


def test_decoded_images_that_a_training_left_are_used(run, photographs, tmp_path):
    from pipeline.cache import build_cache

    decoded = evaluated(run)
    data = DataConfig(dataroot=str(photographs), cache_dir=str(tmp_path / "cache"), image_size=16, decoder="pillow")
    build_cache(data, open_dataset(data), decoder="pillow", kind="host", device=torch.device("cpu"), threads=1)
    (kept,) = (tmp_path / "cache/evaluation").glob("pixels-*")
    kept.unlink()
    assert evaluated(run)["swd"] == decoded["swd"]
    assert not kept.exists()


def test_other_photographs_are_measured_against_with_a_line(run, photographs, tmp_path, capfd):
    other = tmp_path / "other"
    write_faces(other, 15, seed=2, workers=1)
    same = evaluated(run)
    assert "other photographs" not in capfd.readouterr().err
    row = evaluated(run, "--data", str(other))
    told = capfd.readouterr()
    assert "is not what the run was trained on" in told.err
    assert "figures compare with other photographs" in told.err
    assert "12 of 15 photographs" in told.out
    assert row["swd"] != same["swd"]
    assert row["ms_ssim"] == same["ms_ssim"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--metrics", "swd,fdi"], 2, "got 'fdi'; did you mean fid?"),
        (["--metrics", ""], 2, "eval.metrics must be at least one of"),
        (["--num", "21"], 2, "at most the 20 images of data.dataroot, got 21"),
        (["--num", "1"], 2, "must be an integer of at least 2, got '1'"),
        (["--device", "abacus"], 2, "--device must be a device of this machine, got 'abacus'"),
        (["--data", "/nowhere"], 65, "/nowhere"),
        (["--checkpoint", "/nowhere"], 74, "/nowhere: no such run or checkpoint folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_right_code(run, capfd, options, code, said):
    assert said in refused(run, capfd, code, *options)


def test_a_run_without_checkpoints_is_refused_with_74(tmp_path, capfd):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert "holds no checkpoint" in refused(tmp_path / "run", capfd, 74)
    assert "no such run" in refused(tmp_path / "none", capfd, 74)


def test_weights_of_inception_are_asked_for_by_name_and_place_and_held_against_their_hash(run, tmp_path, capfd):
    said = refused(run, capfd, 65, "--metrics", "fid")
    assert SOURCE in said
    assert str(tmp_path / "cache/inception-2015-12-05.pth") in said
    other = tmp_path / "mine.pth"
    other.write_bytes(b"0" * 1000)
    said = refused(run, capfd, 65, "--metrics", "fid", "--inception-weights", str(other))
    assert str(other) in said
    assert hashlib.sha256(b"0" * 1000).hexdigest() in said


def test_without_torch_fidelity_the_extra_is_named(run, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    said = refused(run, capfd, 2, "--metrics", "fid")
    assert "pip install -e '.[metrics]'" in said


def test_inception_looks_at_colour_only(tmp_path, photographs, capfd):
    gray = DataConfig(
        dataroot=str(photographs), cache_dir=str(tmp_path / "cache"), image_size=16, decoder="pillow", nc=1
    )
    run = write_run(tmp_path / "gray", photographs, tmp_path / "cache", data=gray)
    assert "data.nc is 1, since Inception takes RGB only, got 'fid'" in refused(run, capfd, 2, "--metrics", "swd,fid")
    assert evaluated(run)["swd"] > 0


def test_two_ranks_of_torchrun_share_it_and_write_one_line(run):
    alone = evaluated(run, "--batch", "4")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [str(ROOT / "launch/evaluate.py"), str(run), "--batch", "4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("better is") == 1
    first, second = rows(run / "evaluations.jsonl")
    assert first == alone
    assert second["ranks"] == 2
    for name in ("swd", "swd_16", "ms_ssim", "ms_ssim_real"):
        assert second[name] == pytest.approx(alone[name], rel=1e-6)
    assert second["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("options", [["--num", "1"], ["--num", "21"], ["--metrics", "fid"], ["--metrics", "sdw"]])
def test_what_all_ranks_find_wrong_is_told_by_one(run, capfd, monkeypatch, options):
    """A rank's view: with RANK set but no launcher, it is alone in its group."""
    code = main([str(run), *options])
    assert capfd.readouterr().err.count("evaluate.py: error:") == 1
    monkeypatch.setenv("RANK", "1")
    assert main([str(run), *options]) == code
    assert capfd.readouterr().err == ""
