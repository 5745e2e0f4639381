"""What a run chooses among on this machine, and what it tells of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from kernels import native
from pipeline import augment
from pipeline import candidates as module
from pipeline.assembly import Plan
from pipeline.candidates import gathers, settle, settle_mode
from pipeline.choices import Choices
from pipeline.cli import train as command
from pipeline.config import (
    Config,
    ConfigError,
    DataConfig,
    DistributedConfig,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from pipeline.distributed import Ranks
from pipeline.feed import can_normalise
from tests.commands import status_of
from tests.numbered import words, write_numbered
from tests.numerics import load_native

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE = Ranks(0, 1, 0, 1, CPU)
CFG = Config(data=DataConfig(image_size=16), model=ModelConfig(nz=4, ngf=2, ndf=2), train=TrainConfig(batch_size=4))
PLAN = Plan("pillow", "none", "fp32", "eager", (), 10, 40)
KEY = "mode 4x3x16x16 fp32 ngf 2 ndf 2 cpu networks torch batchnorm torch image_ends torch"


def choices(tmp_path, **options) -> Choices:
    return Choices(
        CPU, cache=tmp_path, machine={"device": "cpu", "cpu": "abacus", "threads": 1, "torch": "2"}, **options
    )


def test_on_a_cpu_the_plan_is_eager_and_torchs_and_says_why(tmp_path):
    plan = settle(CFG, PLAN, ONE, choices(tmp_path))
    assert (plan.mode, plan.networks, plan.batchnorm, plan.gather) == ("eager", "torch", "torch", "torch")
    assert plan.reasons == (
        "networks by torch: the C kernels cannot run them: they take channels by 32",
        "mode eager: on a CPU, where no other is known to be faster.",
    )


def test_on_a_cpu_a_mode_that_was_measured_to_be_faster_is_taken_with_its_figures(tmp_path):
    pytest.importorskip("torch._inductor")
    watch = choices(tmp_path)
    module_now = [0.0]

    def taking(seconds):
        def call():
            module_now[0] += seconds

        return call

    watch._clock = lambda: module_now[0]
    operation, key = KEY.split(" ", 1)
    watch.pick(operation, key, {"eager": taking(0.03), "compile": taking(0.02)})
    plan = settle(CFG, PLAN, ONE, choices(tmp_path))
    assert plan.mode == ("eager" if module.compile_problem(CPU) else "compile")
    if plan.mode == "compile":
        assert plan.reasons[-1].startswith("mode compile: eager 30 ms, compile 20 ms; measured 20")


def test_networks_whose_measured_step_is_faster_are_taken_with_their_figures(tmp_path, monkeypatch):
    now = [0.0]

    def steps_of(_cfg, _plan, _ranks, networks):
        def one_step() -> None:
            now[0] += {"torch": 0.03, "native": 0.02}[networks]

        return one_step

    monkeypatch.setattr(module, "_native_problem", lambda *_: "")
    monkeypatch.setattr(module, "_steps_of", steps_of)
    made = choices(tmp_path, clock=lambda: now[0])
    assert settle(CFG, PLAN, ONE, made).networks == "native"
    assert any(line.startswith("networks") and "torch 30 ms, native 20 ms" in line for line in made.lines())


def test_a_mode_that_was_asked_for_is_neither_measured_nor_explained(tmp_path):
    cfg = Config(data=CFG.data, model=CFG.model, train=TrainConfig(batch_size=4, mode="reference"))
    plan = settle(cfg, Plan("pillow", "none", "fp32", "reference", (), 10, 40), ONE, choices(tmp_path))
    assert plan.mode == "reference"
    assert not any(reason.startswith("mode") for reason in plan.reasons)


@pytest.mark.parametrize(("images", "names"), [(1000, ["eager", "graph"]), (10_000_000, ["eager", "graph", "compile"])])
def test_on_a_gpu_all_modes_are_measured_that_can_pay(tmp_path, monkeypatch, images, names):
    monkeypatch.setattr(module, "compile_problem", lambda _device: "")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    asked = {}

    class Measuring:
        def pick(self, operation, key, candidates, override="auto"):
            asked.update({f"{operation} {key}": list(candidates)})
            return "graph"

        def why(self, operation, key):
            return "graph 1 ms, eager 2 ms."

    plan = Plan("pillow", "device", "bf16", "eager", (), 10, images)
    found = settle_mode(CFG, plan, Ranks(0, 1, 0, 1, GPU), Measuring(), "key")
    assert found == ("graph", "graph 1 ms, eager 2 ms.")
    assert asked == {"mode key": names}


def test_what_a_graph_cannot_record_is_not_tried(tmp_path, monkeypatch):
    plan, ranks = Plan("pillow", "device", "bf16", "eager", (), 10, 1000), Ranks(0, 1, 0, 1, GPU)
    parts = dataclasses.replace(CFG, train=dataclasses.replace(CFG.train, micro_batch=2))
    assert settle_mode(parts, plan, ranks, choices(tmp_path), "key") == (
        "eager",
        "the only one that train.micro_batch works with.",
    )
    late = dataclasses.replace(CFG, distributed=DistributedConfig(overlap_g=True))
    assert settle_mode(late, plan, ranks, choices(tmp_path), "key")[0] == "eager"
    apex = dataclasses.replace(CFG, optim=OptimConfig(backend="apex"))
    tried: list[str] = []

    class Measuring(Choices):
        def pick(self, operation, key, candidates, override="auto"):
            tried.extend(candidates)
            return "eager"

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    settle_mode(apex, plan, ranks, Measuring(CPU, machine={"device": "cpu"}), "key")
    assert tried == ["eager"]
    tried.clear()
    ours = dataclasses.replace(CFG, optim=OptimConfig(backend="triton"))
    settle_mode(ours, plan, ranks, Measuring(CPU, machine={"device": "cpu"}), "key")
    assert tried == ["eager", "graph"]


def test_what_is_measured_is_a_step_of_the_mode(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "build_step", lambda cfg, plan, ranks: lambda *a: calls.append((plan.mode, a)))
    one_step = module._steps_of(CFG, PLAN, ONE, mode="graph")
    one_step()
    one_step()
    assert len(calls) == module._STEPS_BEFORE["cpu"] + 2
    mode, (images, latents, seen, batch_size) = calls[-1]
    assert (mode, images.shape, images.dtype, latents.shape) == ("graph", (4, 16, 16, 3), torch.uint8, (4, 4))
    assert (seen, batch_size) == (4 * (module._STEPS_BEFORE["cpu"] + 1), 4)  # the second goes on from the first


def test_a_feed_normalises_only_on_a_gpu_from_its_memory_without_colours(monkeypatch):
    monkeypatch.setattr(native, "_libraries", {})
    fits = {"cache": "device", "channels_last": True}
    assert can_normalise(DataConfig(flip=True, crop_margin=3), GPU, **fits)
    assert not can_normalise(DataConfig(hue=3.0), GPU, **fits)
    assert not can_normalise(DataConfig(), CPU, **fits)
    assert not can_normalise(DataConfig(), GPU, cache="host", channels_last=True)
    assert not can_normalise(DataConfig(), GPU, cache="device", channels_last=False)
    assert list(gathers(CFG, PLAN, CPU, 4)) == ["torch"]


def test_on_a_cpu_it_normalises_from_the_hosts_cache_by_the_c_kernels(monkeypatch):
    load_native()
    assert can_normalise(DataConfig(flip=True, crop_margin=3), CPU, cache="host", channels_last=True)
    assert not can_normalise(DataConfig(), CPU, cache="none", channels_last=True)
    assert not can_normalise(DataConfig(hue=3.0), CPU, cache="host", channels_last=True)
    from_host = dataclasses.replace(PLAN, cache="host")
    ways = gathers(CFG, from_host, CPU, 4)
    assert list(ways) == ["torch", "native"]
    monkeypatch.setattr(module, "_IMAGES_TO_GATHER_FROM", 16)
    for way in ways.values():
        way()


@pytest.mark.parametrize(
    "settings", [{}, {"flip": True}, {"crop_margin": 3}, {"flip": True, "crop_margin": 3, "hue": 9.0}]
)
def test_places_packed_for_one_copy_give_the_same_batch(settings):
    cfg = DataConfig(image_size=16, **settings)
    numbers = np.arange(40, 48)
    params = augment.parameters(cfg, 5, numbers)
    side = 16 + cfg.crop_margin
    source = torch.randint(0, 256, (20, side, side, 3), dtype=torch.uint8)
    items = numbers % 20
    packed = np.full((augment.NUM_PLACES, 8), -1, np.int64)  # nothing of it is read that is not written
    augment.pack_places(items, params, packed)
    places = augment.unpack_places(torch.from_numpy(packed), params)
    ours = augment.take_device(source, places.rows, params, cfg.size, places)
    assert torch.equal(ours, augment.take_device(source, torch.from_numpy(items), params, cfg.size))


def test_a_run_keeps_its_choices_and_says_what_it_uses_and_a_dry_run_prints_what_is_known(tmp_path, capsys):
    images = write_numbered(tmp_path / "images", 6)
    settings = words(images, tmp_path / "run", train__max_images=8)
    assert command.main([*settings, "--dry-run"]) == 0
    assert "kernels               measured at the first start" in capsys.readouterr().out
    assert command.main(settings) == 0
    written = json.loads((tmp_path / "run/choices.json").read_text())
    assert {name.split()[0] for name in written["choices"]} == {"networks", "batchnorm", "image_ends", "gather", "mode"}
    assert "mode eager: on a CPU, where no other is known to be faster." in status_of(tmp_path / "run")["fallbacks"]
    manifest = json.loads((tmp_path / "run/checkpoints/images-000000008/manifest.json").read_text())
    assert {k.split()[0]: v for k, v in manifest["layout"].items() if k.startswith("kernels.")} == {
        "kernels.networks": "torch",
        "kernels.batchnorm": "torch",
        "kernels.image_ends": "torch",
        "kernels.gather": "torch",
    }
    capsys.readouterr()
    assert command.main([*settings, "--dry-run"]) == 0
    assert "kernels               networks 4x3x16x16 fp32 ngf 2 ndf 2: torch" in capsys.readouterr().out
    capsys.readouterr()
    assert command.main(words(images, tmp_path / "run", train__max_images=16)) == 0
    assert "layout differs" not in capsys.readouterr().err


def test_an_implementation_that_is_not_to_be_had_here_is_refused_in_one_line(tmp_path):
    cfg = Config(data=CFG.data, train=CFG.train, kernels=KernelsConfig(gather="triton"))
    with pytest.raises(ConfigError, match=r"kernels.gather must be of torch for gather .* here, got 'triton'"):
        settle(cfg, PLAN, ONE, choices(tmp_path))


def test_on_a_gpu_layers_are_measured_as_steps_of_the_mode_that_will_run(monkeypatch):
    made = []
    monkeypatch.setattr(module, "_steps_of", lambda cfg, plan, ranks, **changed: made.append(changed))
    monkeypatch.setattr(module.language, "AVAILABLE", True)
    gpu = Ranks(0, 1, 0, 1, GPU)
    assert list(module.layer_candidates(CFG, PLAN, gpu, "image_ends")) == ["torch", "triton"]
    assert made == [{"image_ends": "torch", "mode": "graph"}, {"image_ends": "triton", "mode": "graph"}]
    synchronised = Config(data=CFG.data, train=CFG.train, distributed=DistributedConfig(sync_batchnorm=True))
    assert list(module.layer_candidates(synchronised, PLAN, gpu, "batchnorm")) == ["torch"]
    assert list(module.layer_candidates(CFG, PLAN, ONE, "batchnorm")) == ["torch"]


def test_large_images_are_not_measured_on_gibibytes_of_them():
    def images(side: int, share: int) -> int:
        cfg = dataclasses.replace(CFG, data=DataConfig(image_size=side))
        return module._gathered_from(cfg, share)[0]

    assert images(64, 128) == 8192
    assert images(1024, 4) == (256 << 20) // (1024 * 1024 * 3)
    assert images(1024, 128) == 128
