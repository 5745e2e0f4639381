"""Peers of benchmarks.train: other programs that stand still between their turns, a DataLoader for our step."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import roofline, step, train
from benchmarks.peers import PeerArm, Pixels
from benchmarks.plain_loop import PlainLoop
from pipeline.errors import UserError
from pipeline.face_set import write_faces

PROGRAM = """
import itertools, os, subprocess, sys, time
worker = subprocess.Popen(["sleep", "100"])
print("Starting", worker.pid)
for i in itertools.count():
    print(f"[{i}] Loss_D: 1.0")
    time.sleep(0.002)
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "faces"
    write_faces(folder, 12, workers=1)
    return folder


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "GEMM_SIDES", (64,))


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "program.py").write_text(PROGRAM)
    return f"{sys.executable} {tmp_path / 'program.py'}"


def state(pid: int) -> str:
    """R, S, T (stopped), Z, or "" where it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else ""


def until(holds, what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_peer_and_its_workers_stand_still_between_turns_and_end_with_it(program):
    peer = PeerArm(program, pattern="Loss_D")
    try:
        seconds = peer.run(5)
        # Five lines, at least four pauses of 2 ms; other lines do not count, and its start is in the first block.
        assert seconds >= 0.8 * 4 * 0.002
        group = [peer._process.pid, *_children(peer._process.pid)]
        assert len(group) == 2
        until(lambda: [state(pid) for pid in group] == ["T", "T"], "both stopped")
        before = peer._lines
        time.sleep(0.05)  # what it would need for twenty lines
        assert peer._lines <= before + 1  # one may have been under way
        assert peer.run(3) >= 0.8 * 2 * 0.002
    finally:
        peer.close()
    peer.close()
    assert [state(pid) in ("", "Z") for pid in group] == [True, True]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_lines_of_a_program_that_buffers_come_when_they_are_printed(tmp_path):
    """Without a terminal the 4 kB buffer of its output would hold back its first lines until its end."""
    (tmp_path / "p.py").write_text("import time\nprint('one')\nprint('two')\ntime.sleep(1000)\n")
    peer = PeerArm(f"{sys.executable} {tmp_path / 'p.py'}", patience_s=60)
    try:
        assert peer.run(2) > 0
    finally:
        peer.close()


def test_a_peer_that_ends_or_falls_silent_is_a_user_error(tmp_path):
    for text, patience, said in (
        (
            "print('one')\nprint('no CelebA here')",
            60,
            "ended after 2 lines, too few for its blocks; its last: no CelebA",
        ),
        ("import time\ntime.sleep(1000)", 0.1, "printed no line in 0.1 s"),
    ):
        (tmp_path / "p.py").write_text(text)
        peer = PeerArm(f"{sys.executable} {tmp_path / 'p.py'}", patience_s=patience)
        try:
            with pytest.raises(UserError, match=said):
                peer.run(5)
        finally:
            peer.close()
    with pytest.raises(UserError, match="--peer cannot be started: no-such-program x"):
        PeerArm("no-such-program x")


def test_a_loader_gives_our_step_the_pixels_that_the_tutorial_scales(faces):
    from benchmarks.plain_loop import Photographs

    paths = sorted(faces.glob("*.jpg"))
    pixels, (scaled, _) = Pixels(paths, 16)[0], Photographs(paths, 16)[0]
    assert pixels.shape == (16, 16, 3)
    torch.testing.assert_close(pixels.permute(2, 0, 1) / 127.5 - 1, scaled)


def test_the_compiled_loop_is_the_same_loop():
    """Compiled by a back end that only runs the graph: what a compiler makes of it is not looked at here."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        with torch.compiler.set_stance("force_eager"):
            loop = PlainLoop([], size=16, nz=4, ngf=2, ndf=2, compiled=compiled)
            loop.step(torch.randn(2, 3, 16, 16), torch.randn(2, 4, 1, 1))
        found.append((loop.losses_d, loop.losses_g))
    assert found[0] == found[1]


def test_peers_are_measured_beside_the_tutorial(faces, tmp_path, program, capsys):
    words = f"--data {faces} --device cpu --batch 4 --pairs 2 --steps 1 --results {tmp_path} --parts tutorial,loader-2 "
    words += "--peer-batch 8 --peer-line Loss_D --data.image_size 16 --model.ngf 4 --model.ndf 4 "
    words += f"--distributed.threads 1 --data.cache_dir {tmp_path / 'cache'}"
    assert train.main([*words.split(), "--peer", program]) == 0
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())}
    assert list(rows) == ["tutorial", "loader-2", "peer"]
    peer, loader = rows["peer"], rows["loader-2"]
    assert (peer["batch_size"], peer["peer"], peer["precision"]) == (8, program, None)
    assert peer["images_per_s"] == pytest.approx(sum(8 / s for s in peer["block_s"]) / 2, rel=1e-3)
    ratios = [(8 / p) / (4 / t) for p, t in zip(peer["block_s"], rows["tutorial"]["block_s"], strict=True)]
    assert peer["ratio_to_tutorial"] == pytest.approx(sum(ratios) / 2, rel=1e-3)
    assert (loader["cache"], loader["decoder"], loader["workers"]) == ("none", "pillow", 2)
    for row in (loader, rows["tutorial"]):
        assert 0 < row["fraction_of_gemm"] < 1
    assert "of GEMM limit %" in capsys.readouterr().out


def test_steps_are_measured_in_every_mode_beside_the_tutorials(faces, tmp_path, capsys):
    words = (
        f"--data {faces} --device cpu --batches 2,4 --pairs 2 --steps 1 --results {tmp_path} --modes eager,reference "
    )
    words += "--precisions fp32 --data.image_size 16 --model.ngf 2 --model.ndf 2 --distributed.threads 1 "
    words += f"--data.cache_dir {tmp_path / 'cache'}"
    assert step.main(words.split()) == 0
    rows = list(map(json.loads, (tmp_path / "step.jsonl").read_text().splitlines()))
    wanted = [(name, batch) for batch in (2, 4) for name in ("tutorial", "eager-fp32", "reference-fp32")]
    assert [(row["variant"], row["batch_size"]) for row in rows] == wanted
    for row in rows:
        assert row["images_per_s"] == pytest.approx(sum(row["batch_size"] / s for s in row["block_s"]) / 2, rel=1e-3)
        assert row["fraction_of_gemm"] == pytest.approx(row["tflops"] / row["gemm_tflops"], rel=1e-3)
        assert row["first_s"] > 0
        assert row.get("networks", "torch") == "torch"  # too narrow for any other
    assert rows[0]["ratio_to_tutorial"] == 1
    assert "reference-fp32" in capsys.readouterr().out


def test_the_tutorials_step_and_ours_get_the_same_pixels(faces, tmp_path):
    words = f"--data {faces} --device cpu --data.image_size 16 --model.nz 4 --data.cache_dir {tmp_path / 'cache'}"
    args, cfg = step.read_arguments(words.split())
    cfg = step.with_step(cfg, batch=4)
    ranks = step.Ranks(0, 1, 0, 1, torch.device("cpu"))
    dataset = step.open_dataset(cfg.data)
    batches = step.batches_of(cfg, dataset, step.make_plan(cfg, dataset, ranks), ranks.device)
    tutorial = step.TutorialStep(cfg, ranks.device, batches)
    for (images, vectors), (real, noise) in zip(batches, tutorial.batches, strict=True):
        assert torch.equal(((real + 1) * 127.5).round().to(torch.uint8), images.permute(0, 3, 1, 2))
        assert torch.equal(noise.flatten(1), vectors)
    assert args.modes is None
    assert {"eager", "reference"} <= set(step.modes())


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (step.main, "--modes turbo", "--modes must be of eager, reference"),
        (step.main, "--precisions fp8", "--precisions must be of fp32, tf32, bf16, fp16, got 'fp8'"),
        (step.main, "--networks turbo", "--networks must be of auto, torch, native, got 'turbo'"),
        (step.main, "--batches 0", "must be an integer of at least 1, got '0'"),
        (train.main, "--peer-line ( --data .", "--peer-line must be a regular expression, got '('"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(main, words, said, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
