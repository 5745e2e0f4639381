"""The model of many GPUs against hand computation, and the ranks of this machine by the real command."""

import json

import pytest

from benchmarks import scaling, scaling_model
from benchmarks.scaling_model import Cluster, Link, Network
from pipeline.cli.options import parse
from pipeline.face_set import write_faces

FAST = Link("fast", 100.0, 0.5, "made up")
SLOW = Link("slow", 10.0, 2.0, "made up")
CLUSTER = Cluster(FAST, SLOW, gpus_per_node=4, achieved=0.5, start_s=1.0)
"""Bytes and seconds that one can work out: 50 bytes/s within a node, 5 between nodes."""


@pytest.mark.parametrize(
    ("gpus", "seconds"),
    [
        (1, 0.0),
        (2, 1 + 2 * 1 * 0.5 + 2 * (1 / 2) * 80 / 50),  # one node of two
        (4, 1 + 2 * 3 * 0.5 + 2 * (3 / 4) * 80 / 50),
        (8, 1 + 3 + 2.4 + 2 * 1 * 2.0 + 2 * (1 / 2) * 20 / 5),  # two nodes, a quarter of the bytes on each link
        (32, 1 + 3 + 2.4 + 2 * 3 * 2.0 + 2 * (7 / 8) * 20 / 5),  # eight nodes: a tree three high
    ],
)
def test_an_all_reduce_of_80_bytes_takes_what_its_hops_and_bytes_take(gpus, seconds):
    assert CLUSTER.all_reduce_s(80, gpus) == pytest.approx(seconds)


def test_all_buckets_but_the_last_hide_behind_backward():
    one = CLUSTER.all_reduce_s(20, 4)  # 1 + 3 + 1.5 * 20 / 50 = 4.6
    assert one == pytest.approx(4.6)
    network = Network(gradient_bytes=80, num_buckets=4, backward_share=0.5)
    assert network.exposed_s(100, CLUSTER, 4) == pytest.approx(4.6)  # 13.8 s against 3 / 4 of 50
    assert network.exposed_s(16, CLUSTER, 4) == pytest.approx(4.6 + 3 * 4.6 - 6)  # against 3 / 4 of 8
    assert network.exposed_s(16, CLUSTER, 1) == 0
    assert Network(20, 1, 0.5).exposed_s(100, CLUSTER, 4) == pytest.approx(4.6)


def test_steps_between_measured_ones_lie_on_a_line():
    measured = {128: 2.0, 512: 6.0}
    assert [scaling_model.step_s_at(b, measured) for b in (16, 128, 320, 512, 1024)] == [2, 2, 4, 6, 12]


def test_weak_and_strong_scaling_of_a_network_by_hand():
    network = (Network(80, 4, 0.5),)
    weak = scaling_model.weak(10, 4, {10: 100.0}, network, CLUSTER)
    assert (weak.step_s, weak.exposed_s) == pytest.approx((104.6, 4.6))
    assert weak.images_per_s == pytest.approx(40 / 104.6)
    assert weak.efficiency == pytest.approx(100 / 104.6)
    strong = scaling_model.strong(40, 4, {10: 100.0, 40: 300.0}, network, CLUSTER)
    assert strong.batch_per_gpu == 10
    assert strong.images_per_s == pytest.approx(40 / 104.6)
    assert strong.efficiency == pytest.approx(300 / 104.6 / 4)
    alone = scaling_model.strong(40, 1, {10: 100.0, 40: 300.0}, network, CLUSTER)
    assert (alone.efficiency, alone.exposed_s) == (1, 0)


def test_the_reference_networks_travel_in_buckets_of_4_mib():
    generator, discriminator = scaling.networks_for(parse([]).config)
    assert (generator.gradient_bytes, generator.num_buckets) == (4 * 3_576_704, 4)
    assert (discriminator.gradient_bytes, discriminator.num_buckets) == (4 * 2_765_568, 3)
    # MFLOP forward, an image: three layers of 67.1 each, the 3-channel end 6.3, G's first 1.6, D's last 0.02.  Backward
    # is twice that, less the gradient of latents and of photographs, and D's for real and fake; of 2274.6 in a step.
    assert generator.backward_share == pytest.approx((2 * 209.27 - 1.64) / 2274.6, rel=1e-3)
    assert discriminator.backward_share == pytest.approx(2 * (2 * 207.63 - 6.29) / 2274.6, rel=1e-3)


def test_links_say_where_their_figures_are_from():
    for link in (*scaling_model.WITHIN.values(), *scaling_model.BETWEEN.values()):
        assert link.source, link.name
        assert 1e9 < link.bytes_per_s < 1e12, link.name
        assert 1e-6 < link.hop_s < 1e-4, link.name


def test_the_model_takes_the_fastest_steps_of_the_newest_run_on_a_gpu(tmp_path, capsys):
    def row(batch: int, images_per_s: float, **facts) -> str:
        usual = {
            "variant": "eager-bf16",
            "device": "cuda",
            "commit": "b" * 40,
            "date": "2",
            "hardware": {"gpus": ["H"]},
        }
        return json.dumps(usual | {"batch_size": batch, "images_per_s": images_per_s} | facts) + "\n"

    rows = row(64, 1.0, date="1") + row(128, 64_000.0) + row(128, 32_000.0, variant="reference-fp32")
    rows += row(512, 128_000.0) + row(512, 1e9, variant="tutorial") + row(512, 1e9, device="cpu", date="3")
    (tmp_path / "step.jsonl").write_text(rows)
    assert scaling.recorded_steps(tmp_path / "step.jsonl") == (
        {128: 0.002, 512: 0.004},
        "step.jsonl, commit bbbbbbbbbbbb, H",
    )
    words = f"--model-only --results {tmp_path} --gpus 1,8,512 --global-batch 512"
    assert scaling.main(words.split()) == 0
    weak, strong = map(json.loads, (tmp_path / "scaling.jsonl").read_text().splitlines())
    assert [p["num_gpus"] for p in weak["points"]] == [1, 8, 512]
    assert weak["points"][0]["images_per_s"] == 128_000
    assert [p["num_gpus"] for p in strong["points"]] == [1, 8]  # 512 images are less than two each on 512 GPUs
    assert weak["step_ms"] == {"128": 2, "512": 4}
    assert weak["cluster"]["within"]["source"]
    printed = capsys.readouterr().out
    assert "model-weak, batch 512: 8 GPUs a node by NVLink 4, nodes by InfiniBand NDR, 80 % of either" in printed


def test_without_a_measured_step_there_is_no_model(tmp_path, capsys):
    assert scaling.main(["--model-only", "--results", str(tmp_path)]) == 0
    assert "no model: step.jsonl has no row of a GPU" in capsys.readouterr().err
    assert not (tmp_path / "scaling.jsonl").exists()


def test_ranks_share_a_batch_or_have_one_each(capsys):
    assert scaling.jobs_of([4, 1, 2], 6) == [
        scaling.Job("weak-1", 1, 6),
        scaling.Job("weak-2", 2, 12),
        scaling.Job("strong-2", 2, 6),
        scaling.Job("weak-4", 4, 24),
    ]
    assert "strong-4 is left out" in capsys.readouterr().err


def test_ranks_of_this_machine_train_by_the_real_command(tmp_path, capsys):
    write_faces(tmp_path / "faces", 12, workers=1)
    words = f"--data {tmp_path / 'faces'} --device cpu --ranks 2 --batch 3 --steps 1 --windows 2 --repeats 1 "
    words += f"--threads 1 --results {tmp_path} --data.image_size 16 --model.ngf 2 --model.ndf 2 --log.grid_size 4 "
    words += f"--data.cache_dir {tmp_path / 'cache'}"
    assert scaling.main(words.split()) == 0
    one, two = map(json.loads, (tmp_path / "scaling.jsonl").read_text().splitlines())
    assert [one["variant"], two["variant"]] == ["weak-1", "weak-2"]
    assert (one["ratio_to_one"], one["efficiency"]) == (1, 1)
    assert (two["ranks"], two["batch_size"]) == (2, 6)
    assert two["efficiency"] == pytest.approx(two["ratio_to_one"] / 2, rel=1e-3)
    assert "weak-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--achieved 2", "--achieved must be at most 1, got 2"),
        ("--ranks 1,x", "must be an integer of at least 1, got 'x'"),
        ("--step-ms 128", "must be a number above 0, got ''"),
        ("--within rope", "invalid choice: 'rope'"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(words, said, capsys):
    assert scaling.main(["--model-only", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_run_that_fails_is_named_by_its_last_line(tmp_path, monkeypatch, capsys):
    write_faces(tmp_path / "faces", 4, workers=1)
    monkeypatch.setattr(
        scaling.subprocess, "run", lambda *_, **__: scaling.subprocess.CompletedProcess([], 65, "a\nb\n")
    )
    words = f"--data {tmp_path / 'faces'} --device cpu --ranks 1 --repeats 1 --no-record"
    assert scaling.main(words.split()) == 1
    assert "the run on 1 rank(s) ended with 65: b" in capsys.readouterr().err
