"""launch/plan.py: what it says of a run that is not begun, held against what runs do."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import cache
from pipeline.assembly import build_networks
from pipeline.checkpoint import buffers_of, snapshot, write
from pipeline.cli import plan
from pipeline.cli.options import parse
from pipeline.config import Config
from pipeline.face_set import write_faces
from pipeline.loop import Maintenance
from pipeline.players import make_players
from pipeline.sizes import checkpoint_bytes, disk_of, memory_of, networks_of, num_due, num_saves

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--data.image_size", "16", "--model.ngf", "4", "--model.ndf", "4", "--model.nz", "8")
CELEBA = ("--config", str(ROOT / "configs/celeba64.yaml"), "--num-images", "202599")


@pytest.fixture
def planned(capsys):
    """What the command prints for these words, once it ended with 0."""

    def run(*words: str) -> str:
        code = plan.main(words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def cells(text: str, name: str) -> list[str]:
    """The row of the table that begins with this name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())[1:]


def row(**changes) -> dict:
    """A line of benchmarks.train as far as the plan reads it."""
    values = {
        "variant": "trainer", "device": "cpu", "precision": "bf16", "dirty": False, "batch_size": 128, "threads": 2,
        "image_size": 64, "nz": 100, "ngf": 64, "ndf": 64, "images_per_s": 200.0, "commit": "0123456789abcdef",
        "date": "2026-11-23T00:00:00+00:00", "hardware": {"cpu": "Some CPU", "gpus": []},
    }  # fmt: skip
    return values | changes


def rows_file(folder: Path, *rows: dict) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def test_the_tutorials_settings_come_to_the_tutorials_numbers(planned):
    text = planned(*CELEBA, "--gpus", "1,8,64", "--images-per-s", "1000")
    assert "7,915 steps of 128: 1,013,120 images, 5.00 epochs" in text
    assert "generator 3,576,704 parameters, discriminator 2,765,568; 2,274.6 MFLOP" in text
    assert cells(text, "images of a batch on each rank") == ["128", "16", "2"]
    both = 4 * (3_576_704 + 2_765_568) / 2**20
    assert cells(text, "weights and gradients") == [f"{2 * both:.1f} MiB"] * 3
    assert cells(text, "on disk and in memory of a machine") == [f"{202_599 * 64 * 64 * 3 / 2**30:.2f} GiB"] * 3


def test_one_rank_goes_at_the_given_rate_and_many_at_the_assumed_share_of_theirs(planned):
    text = planned(*CELEBA, "--gpus", "1,8", "--images-per-s", "1000", "--efficiency", "0.5")
    assert cells(text, "images/s, estimated") == ["1,000", "4,000"]
    assert cells(text, "time, estimated") == ["16.9 min", "4.2 min"]
    assert "0.5 of their rates added up, an assumption" in text


def test_a_time_limit_is_told_in_starts(planned):
    text = planned(*CELEBA, "--gpus", "1", "--images-per-s", "100", "--train.max_minutes", "60")
    assert cells(text, "starts of train.max_minutes 60") == ["3"]  # 10,131 seconds


@pytest.mark.parametrize(
    ("batch", "ranks", "nearest"),
    [(128, 3, "126 or 129"), (128, 64, "128"), (128, 100, "200"), (128, 65, "130"), (10, 4, "8 or 12"), (3, 2, "4")],
)
def test_the_nearest_batch_that_the_ranks_can_share_is_named_and_can_be_shared(planned, batch, ranks, nearest):
    text = planned(*CELEBA, *SMALL, "--train.batch_size", str(batch), "--gpus", f"{ranks},7000", "--images-per-s", "1")
    assert cells(text, "nearest train.batch_size")[0] == nearest
    for size in nearest.split(" or "):
        train = dataclasses.replace(Config().train, batch_size=int(size))
        assert dataclasses.replace(Config(), train=train).per_rank(ranks) >= 2


def test_a_column_whose_batch_does_not_divide_promises_no_time(planned):
    text = planned(*CELEBA, "--gpus", "1,3", "--images-per-s", "1000")
    assert cells(text, "images of a batch on each rank") == ["128", "no"]
    assert cells(text, "time, estimated")[1] == "-"


def test_photographs_are_counted_and_the_cache_is_what_the_trainer_would_choose(planned, tmp_path):
    write_faces(tmp_path / "faces", 30, workers=1)
    data = ("--data.dataroot", str(tmp_path / "faces"), "--data.cache_dir", str(tmp_path / "cache"))
    text = planned(*data, *SMALL, "--ranks", "1", "--images-per-s", "1")
    assert f"30 images in {tmp_path / 'faces'}, 0 files left out" in text
    assert cells(text, "decoded images: data.cache") == ["host"]
    assert cells(planned(*data, *SMALL, "--ranks", "1", "--data.cache", "none"), "decoded images") == ["none"]


def test_the_conditions_of_an_automatic_cache_are_those_of_the_cache():
    assert (cache._SPARE_DISK, cache._SHARE_OF_MEMORY) == (2**30, 0.5)


def test_a_checkpoint_has_the_size_that_was_told(tmp_path):
    for ranks, ema in ((1, 5000), (2, 0)):
        settings = ["--data.image_size", "32", "--model.ngf", "32", "--optim.ema_half_life_images", str(ema)]
        cfg = parse(settings).config
        players = make_players(*build_networks(cfg, torch.device("cpu")), cfg.optim, lr=1e-4, precision="fp32")
        for network, optimizer in (
            (players.generator, players.optimizer_g),
            (players.discriminator, players.optimizer_d),
        ):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        state = snapshot(players, [buffers_of(players)] * ranks)
        folder = write(tmp_path / str(ranks), state, "", {"images_seen": 1})
        written = sum(path.stat().st_size for path in folder.iterdir())
        assert checkpoint_bytes(cfg, networks_of(cfg), ranks) == pytest.approx(written, rel=0.01)


def test_what_is_due_is_counted_as_the_loop_does_it():
    for batch, every, steps in ((8, 20, 50), (8, 8, 7), (8, 3, 11), (128, 50_000, 900), (8, 0, 5), (8, 1000, 3)):
        cfg = parse(["--train.batch_size", str(batch)]).config
        entry = Maintenance(every, lambda _seen: None)
        done = sum(entry.due(i * batch, (i + 1) * batch, i == steps - 1) for i in range(steps))
        assert num_due(every, cfg, steps) == done


def test_checkpoints_that_evaluations_write_are_counted_as_the_loop_does_it():
    for batch, every, evaluations, steps in (
        (8, 20, 28, 50),
        (8, 24, 24, 20),
        (8, 0, 30, 9),
        (8, 3, 5, 7),
        (8, 40, 0, 9),
    ):
        sizes = {"train.batch_size": batch, "checkpoint.every_images": every, "eval.every_images": evaluations}
        cfg = parse([word for key, value in sizes.items() for word in (f"--{key}", str(value))]).config
        entries = [Maintenance(every, lambda _seen: None)] + [Maintenance(evaluations, lambda _seen: None)] * (
            evaluations > 0
        )
        done = sum(
            any(entry.due(i * batch, (i + 1) * batch, i == steps - 1) for entry in entries) for i in range(steps)
        )
        assert num_saves(cfg, steps) == done, sizes
    every_third = ["--checkpoint.every_images", "1000", "--checkpoint.keep", "3", "--eval.every_images", "500"]
    cfg = parse(every_third).config
    assert disk_of(cfg, networks_of(cfg), 100, 1).num_checkpoints == 5, "three, the best, and the one being written"


def test_the_plan_tells_the_checkpoints_of_evaluations_and_the_memory_of_a_part(planned):
    words = (*CELEBA, "--gpus", "1", "--checkpoint.every_images", "100000")
    assert "checkpoints  11, the newest 3 stay\n" in planned(*words)
    text = planned(*words, "--eval.every_images", "200000")
    assert "checkpoints  11, the newest 3 stay, and the best\n" in text
    assert "checkpoints  14, the newest 3 stay, and the best\n" in planned(*words, "--eval.every_images", "150000")
    whole, part = cells(text, "activations"), cells(planned(*words, "--train.micro_batch", "32"), "activations")
    assert float(part[0].split()[0]) == pytest.approx(float(whole[0].split()[0]) / 4, rel=0.01)


def test_no_more_checkpoints_lie_on_the_disk_than_are_written():
    cfg = parse(["--checkpoint.every_images", "1000", "--checkpoint.keep", "3"]).config
    networks = networks_of(cfg)
    assert [disk_of(cfg, networks, steps, 1).num_checkpoints for steps in (1, 16, 100)] == [1, 2, 4]


def test_half_the_precision_takes_half_the_activations():
    cfg = parse(list(SMALL)).config
    networks = networks_of(cfg)
    wide, narrow = (memory_of(cfg, networks, precision, 16) for precision in ("fp32", "bf16"))
    assert wide.activations == 2 * narrow.activations
    assert wide.states == narrow.states


def test_a_recorded_rate_is_scaled_by_the_arithmetic_and_its_row_is_named(planned, tmp_path):
    recorded = ("--results", rows_file(tmp_path, row(variant="tutorial", images_per_s=1.0), row()))
    same = planned(*CELEBA, "--ranks", "1", "--precision", "bf16", *recorded)
    assert cells(same, "images/s, estimated") == ["200"]
    assert "line 2 (commit 0123456789ab, 2026-11-23): 200 on Some CPU" in " ".join(same.split())
    half = [*CELEBA, "--model.ngf", "32", "--model.ndf", "32"]
    text = planned(*half, "--ranks", "1", "--precision", "bf16", *recorded)
    cfg = parse(half[:2]).config
    narrow = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ngf=32, ndf=32))
    expected = 200 * networks_of(cfg).flops / networks_of(narrow).flops
    assert cells(text, "images/s, estimated") == [f"{expected:,.0f}"]
    assert "an estimate from" in text


def test_the_row_of_the_same_precision_is_taken_then_a_clean_one_then_the_newest(planned, tmp_path):
    rows = (
        row(precision="fp32", images_per_s=10.0), row(dirty=True, images_per_s=20.0), row(images_per_s=30.0),
        row(images_per_s=40.0), row(device="cuda", images_per_s=50.0, hardware={"cpu": "", "gpus": ["Some GPU"]}),
    )  # fmt: skip
    results = ("--results", rows_file(tmp_path, *rows))
    for precision, rate in (("fp32", "10"), ("bf16", "40")):
        text = planned(*CELEBA, "--ranks", "1", "--precision", precision, *results)
        assert cells(text, "images/s, estimated") == [rate]
    text = planned(*CELEBA, "--gpus", "1", "--precision", "bf16", *results)
    assert cells(text, "images/s, estimated") == ["50"]
    assert "on Some GPU" in " ".join(text.split())


def test_where_nothing_is_recorded_no_time_is_told(planned, tmp_path):
    text = planned(*CELEBA, "--gpus", "8", "--results", rows_file(tmp_path, row()))
    assert cells(text, "time, estimated") == ["-"]
    assert "has no row of a GPU; give --images-per-s" in " ".join(text.split())


def test_the_recorded_rows_of_this_repository_can_be_read(planned):
    assert "benchmarks/results/train.jsonl, line" in planned(*CELEBA, "--ranks", "1")


def test_a_measurement_takes_real_steps_here(planned):
    threads = torch.get_num_threads()
    try:
        text = planned(*CELEBA, *SMALL, "--ranks", "1,2,5", "--measure", "--measure-s", "0.05")
    finally:
        torch.set_num_threads(threads)
    one, two, none = cells(text, "images/s, estimated")
    assert int(one.replace(",", "")) > 0
    assert int(two.replace(",", "")) > 0
    assert none == "-"
    assert re.search(r"measured now on .* at 128 images, .* at 64 images", " ".join(text.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the photographs, --data.dataroot PATH, or how many there are, --num-images N"),
        (["--num-images", "0"], "--num-images: must be an integer of at least 1, got '0'"),
        ([*CELEBA, "--gpus", "1,x"], "--gpus: must be an integer of at least 1, got 'x'"),
        ([*CELEBA, "--gpus", "1", "--ranks", "1"], "--ranks: not allowed with argument --gpus"),
        ([*CELEBA, "--images-per-s", "0"], "--images-per-s: must be above 0, got '0'"),
        ([*CELEBA, "--efficiency", "1.5"], "--efficiency: must be above 0 and at most 1, got '1.5'"),
        ([*CELEBA, "--model.ngff", "3"], "--model.ngff is no option; did you mean model.ngf?"),
        ([*CELEBA, "--results", "/no/file"], "--results names no readable file: /no/file"),
        ([*CELEBA, "--results", __file__], "--results must be rows of benchmarks.train"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, words, message):
    assert plan.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("plan.py: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to measure")
def test_a_gpu_that_is_not_here_is_not_measured(capsys):
    assert plan.main([*CELEBA, "--gpus", "1", "--measure"]) == 2
    assert "this machine, which has no GPU" in capsys.readouterr().err


def test_the_script_runs_from_any_folder(tmp_path):
    words = [sys.executable, str(ROOT / "launch/plan.py"), "--num-images", "1000", *SMALL, "--gpus", "1,2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 GPU" in done.stdout
    assert "2 GPUs" in done.stdout
    assert not list(tmp_path.iterdir())
