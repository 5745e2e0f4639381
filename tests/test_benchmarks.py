"""The benchmarks measure what they say: pairing, intervals, result lines, a peer that trains as the tutorial does."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data, harness, plain_loop, quality, roofline, train
from kernels import native
from pipeline.config import OptimConfig
from pipeline.face_set import write_faces
from pipeline.models import Discriminator, Generator, initialise
from pipeline.players import make_players
from pipeline.step import ReferenceStep

PROMISED = {
    "benchmark", "variant", "images_per_s", "images_per_s_quartiles", "ratio_to_tutorial", "ratio_interval",
    "commit", "dirty", "hardware", "versions", "command", "date",
}  # fmt: skip


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "faces"
    write_faces(folder, 12, workers=1)
    return folder


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_interval_of_a_median_is_where_order_statistics_put_it():
    values = np.random.default_rng(1).permutation(np.arange(1.0, 102.0))
    found = harness.estimate(values.tolist())
    assert found.median == 51
    # Binomial(101, 1/2) puts the 95 % interval of the median at the 41st and the 61st value.
    assert abs(found.low - 41) <= 2
    assert abs(found.high - 61) <= 2
    assert found == harness.estimate(values.tolist())
    assert harness.estimate([2.5] * 7) == harness.Estimate(2.5, 2.5, 2.5)
    assert harness.estimate([3.0]) == harness.Estimate(3.0, 3.0, 3.0)


def test_blocks_alternate_and_the_order_turns_round_every_other_round():
    called: list[tuple[str, int]] = []
    times = {"a": itertools.count(1.0), "b": itertools.count(10.0)}

    def arm(name: str):
        def run(steps: int) -> float:
            called.append((name, steps))
            return next(times[name])

        return run

    seconds = harness.paired({"a": arm("a"), "b": arm("b")}, pairs=4, steps=3)
    assert [name for name, _ in called] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {steps for _, steps in called} == {3}
    assert seconds == {"a": [1, 2, 3, 4], "b": [10, 11, 12, 13]}
    assert harness.ratios(seconds["b"], seconds["a"]) == [10, 5.5, 4, 3.25]


def test_a_result_line_says_what_was_measured_and_on_what(tmp_path):
    argv = ["--data", "a folder", "--pairs", "3"]
    recorder = harness.Recorder("train", argv, tmp_path / "new" / "results")
    first = recorder.add("trainer", [100.0, 300.0, 200.0], [2.0, 4.0, 3.0], precision="bf16", block_s=[1 / 3])
    recorder.add("tutorial", [50.0], None)
    found = lines_of(tmp_path / "new" / "results" / "train.jsonl")
    assert found[0] == first
    assert [row["variant"] for row in found] == ["trainer", "tutorial"]
    assert all(row.keys() >= PROMISED for row in found)
    assert (first["images_per_s"], first["images_per_s_quartiles"]) == (200, [150, 250])
    assert (first["ratio_to_tutorial"], first["ratio_interval"]) == (3, [2, 4])
    assert (found[1]["ratio_to_tutorial"], found[1]["ratio_interval"]) == (None, None)
    assert first["command"] == "python -m benchmarks.train --data 'a folder' --pairs 3"
    assert first["block_s"] == [0.33333]
    assert {"cpu", "cores"} <= first["hardware"].keys()
    assert {"python", "torch"} <= first["versions"].keys()
    assert first["date"].endswith("+00:00")


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harness.Recorder("train", [], None).add("trainer", [1.0], None)
    assert not list(tmp_path.iterdir())


def test_the_table_is_aligned():
    text = harness.table(("variant", "images/s"), [("a", "1.0"), ("longer-name", "12,345.0")]).splitlines()
    assert text == ["variant      images/s", "-----------  --------", "a                 1.0", "longer-name  12,345.0"]


def test_the_peer_trains_as_the_reference_step_does(faces):
    """Same weights, images and latents: the same losses and judgements, step after step, and the same weights."""
    nz, width, side, count = 10, 4, 32, 8
    loop = plain_loop.PlainLoop(sorted(faces.glob("*.jpg")), size=side, batch_size=4, nz=nz, ngf=width, ndf=width)
    loop.close()
    generator, discriminator = Generator(nz, width, 3, side, side), Discriminator(width, 3, side, side)
    random = torch.Generator().manual_seed(0)
    pairs = ((loop.generator, generator), (loop.discriminator, discriminator))
    with torch.no_grad():
        for plain, ours in pairs:
            initialise(ours, random)
            for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
                theirs.copy_(mine)
    players = make_players(generator, discriminator, OptimConfig(), lr=2e-4, precision="fp32")
    reference = ReferenceStep(players, "fp32", channels_last=False, ema_half_life_images=0)
    for step in range(3):
        pixels = torch.randint(0, 256, (count, side, side, 3), generator=random, dtype=torch.uint8)
        latents = torch.randn(count, nz, generator=random)
        wanted = reference(pixels, latents, step * count, count)[:5]  # the tutorial's five
        judged = loop.step(pixels.permute(0, 3, 1, 2) / 127.5 - 1, latents[:, :, None, None])
        found = torch.tensor([loop.losses_d[-1], loop.losses_g[-1], *judged])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for plain, ours in pairs:
        for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
            assert (theirs - mine).norm() <= 1e-3 * mine.norm()


def test_the_peer_has_the_tutorials_networks():
    generator, discriminator = plain_loop.make_generator(100, 64, 64), plain_loop.make_discriminator(64, 64)
    assert [sum(p.numel() for p in n.parameters()) for n in (generator, discriminator)] == [3_576_704, 2_765_568]
    pictures = generator(torch.randn(2, 100, 1, 1))
    assert pictures.shape == (2, 3, 64, 64)
    assert discriminator(pictures).shape == (2, 1, 1, 1)


def test_the_peer_sees_every_photograph_once_an_epoch_as_the_tutorial_scales_it(tmp_path):
    Image.new("L", (20, 30), 255).save(tmp_path / "white.png")
    photograph, label = plain_loop.Photographs([tmp_path / "white.png"], 16)[0]
    assert photograph.shape == (3, 16, 16)
    assert photograph.unique().tolist() == [1.0]
    assert label == 0
    walk = list(itertools.islice(plain_loop.EndlessShuffle(6), 18))
    assert all(sorted(walk[i : i + 6]) == list(range(6)) for i in (0, 6, 12))
    assert len({tuple(walk[i : i + 6]) for i in (0, 6, 12)}) > 1


def test_training_is_measured_beside_the_tutorials_loop(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "GEMM_SIDES", (64,))
    words = f"--data {faces} --device cpu --batch 4 --pairs 2 --steps 1 --results {tmp_path} --precision bf16 "
    words += "--parts tutorial,trainer,bare-step,trainer-nocache,memory --data.image_size 16 --model.ngf 4 "
    words += "--model.ndf 4 --log.report false --log.grid_size 4 --distributed.threads 1 "
    words += f"--data.cache_dir {tmp_path / 'cache'}"
    assert train.main(words.split()) == 0
    rows = {row["variant"]: row for row in lines_of(tmp_path / "train.jsonl")}
    assert list(rows) == ["tutorial", "trainer", "bare-step", "trainer-nocache"]
    for row in rows.values():
        assert row.keys() >= PROMISED | {"precision", "cache", "decoder", "batch_size", "image_size", "ngf", "threads"}
        assert row["images_per_s"] > 0
        assert len(row["block_s"]) == row["pairs"] == 2
        assert 0 <= row["data_wait_percent"] <= 100
        assert row["ratio_interval"][0] <= row["ratio_to_tutorial"] <= row["ratio_interval"][1]
    assert rows["tutorial"]["ratio_to_tutorial"] == 1
    assert (rows["trainer"]["precision"], rows["trainer"]["cache"]) == ("bf16", "host")
    assert rows["trainer-nocache"]["cache"] == "none"
    assert rows["trainer"]["ratio_to_bare_step"] > 0
    assert 0.1 < rows["trainer"]["peak_gib"] < 8
    assert rows["trainer"]["first_step_s"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("trainer-nocache", "bare-step", "ratio to tutorial"))


def test_reading_is_measured_for_every_source_and_decoder(faces, tmp_path, capsys):
    words = f"--data {faces} --device cpu --seconds 0.01 --repeats 2 --batch 4 --size 16 --results {tmp_path}"
    assert data.main(words.split()) == 0
    rows = {row["variant"]: row for row in lines_of(tmp_path / "data.jsonl")}
    decoders = {row["decoder"] for row in rows.values()}
    ours = {f"{s}-{d}" for s in ("folder", "zip", "zip-deflated", "tar") for d in decoders}
    cached = {f"cache-host{dtype}{flip}" for dtype in ("", "-bf16") for flip in ("", "-flip")}
    if not native.loaded():
        cached = {name for name in cached if "bf16" not in name}
    assert rows.keys() == ours | {f"plain-{d}" for d in decoders} | cached
    for row in rows.values():
        assert row.keys() >= PROMISED | {"images_per_cpu_s", "ratio_per_core", "source", "decoder", "cache", "flip"}
        assert row["images_per_s"] > 0
        assert row["num_images"] == 12
    assert rows["plain-pillow"]["ratio_to_tutorial"] == rows["plain-pillow"]["ratio_per_core"] == 1
    assert "cache-host-flip" in capsys.readouterr().out


def test_every_container_holds_the_same_photographs(faces, tmp_path):
    dataset = data.open_dataset(data.DataConfig(dataroot=str(faces), cache_dir=str(tmp_path / "cache")))
    paths = data.write_containers(dataset, tmp_path)
    found = [
        data.open_dataset(data.DataConfig(dataroot=str(p), cache_dir=str(tmp_path / "cache"))) for p in paths.values()
    ]
    assert len({each.fingerprint for each in found}) == 1
    assert [len(each) for each in found] == [12] * 4


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (train.main, "--parts trainer,turbo", "--parts must be of usual, peers, trainer-fp32, tutorial"),
        (train.main, "--data . --train.batchsize 4", "did you mean train.batch_size?"),
        (train.main, "--data . --data.image_size 48", "data.image_size and data.nc must be a power of two and 3"),
        (train.main, "--pairs 0", "must be an integer of at least 1"),
        (data.main, "--seconds -1", "must be a number above 0, got '-1'"),
        (data.main, "--sec 1", "unrecognized arguments: --sec"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(main, words, said, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_quality_measures_a_plain_loop_and_a_run_alike(faces, tmp_path, capsys):
    """The two actions as one types them, on tiny networks: a generator kept, then measured, a line and a row for it."""
    words = f"tutorial --data {faces} --device cpu --images 8 --batch 4 --ngf 2 --size 16 --out {tmp_path / 'plain'}"
    assert quality.main(words.split()) == 0
    kept = tmp_path / "plain" / "generator.pt"
    words = f"measure --data {faces} --device cpu --size 16 --num 4 --results {tmp_path} a={kept} a={kept} b={kept}"
    assert quality.main(words.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["a", "a", "b"]
    assert {row["swd"] for row in rows} == {rows[0]["swd"]}
    assert rows[0]["swd"] > 0
    assert rows[0]["images_seen"] == 8
    assert "± 0" in capsys.readouterr().out


def test_quality_refuses_what_it_cannot_take(capsys):
    assert quality.main(["tutorial"]) == 2
    assert quality.main(["measure", "a"]) == 2
    assert "ARM=PATH" in capsys.readouterr().err
