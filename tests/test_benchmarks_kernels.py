"""The roofline against hand computation, and that every operation of benchmarks/kernel_cases.py is what it says."""

import itertools
import json
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import kernel_cases, kernels, roofline
from benchmarks.kernel_cases import ALL, Cost, Setting, Way
from benchmarks.roofline import Machine
from pipeline.models import Discriminator, Generator, forward_flops

CPU = torch.device("cpu")
TINY = Setting(batch=3, device=CPU, precision="fp32", size=16, width=2, nz=5)
BATCH = TINY.batch
SMALL = "--batch 2 --size 16 --width 2 --device cpu"


def cases(setting=TINY):
    return [case for make in ALL.values() for case in make(setting)]


def test_the_bound_is_the_slower_of_arithmetic_and_memory():
    machine = Machine(gemm_flops_per_s=100e9, copy_bytes_per_s=10e9)
    assert machine.bound_s(200e9, 10e9) == 2
    assert machine.limited_by(200e9, 10e9) == "arithmetic"
    assert machine.bound_s(200e9, 30e9) == 3
    assert machine.limited_by(200e9, 30e9) == "memory"


def test_rates_are_operations_and_bytes_a_second(monkeypatch):
    """With a clock on which every call takes half a second."""
    monkeypatch.setattr(roofline, "call_s", lambda function, calls, device: (function(), 0.5)[1])
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "GEMM_SIDES", (32, 64))
    assert roofline.gemm_rate("fp32", CPU) == 2 * 32**3 / 0.5  # the larger is not tried: this one took long
    assert roofline.copy_bandwidth(CPU) == 2 * 2**20 / 0.5


def test_a_call_is_timed_as_often_as_asked_for():
    called = []
    assert roofline.call_s(lambda: called.append(1), 5, CPU) > 0
    assert roofline.host_s(lambda: called.append(1), 3, CPU) > 0
    assert len(called) == 8


def test_the_convolutions_cases_are_the_networks():
    generator, discriminator = Generator(5, 2, 3, 16, 16), Discriminator(2, 3, 16, 16)
    for name, network in (("conv", discriminator), ("conv-transpose", generator)):
        found = [kernels.cost_of(case, "forward").flops for case in ALL[name](TINY)]
        assert found == [BATCH * flops for flops in forward_flops(network, 16, 16)], name
        weights = [case.inputs[1].shape for case in ALL[name](TINY)]
        assert weights == [m.weight.shape for m in network.layers if hasattr(m, "kernel_size")], name
    widths = [m.num_features for m in itertools.chain(discriminator.layers, generator.layers) if hasattr(m, "momentum")]
    assert sorted(case.inputs[0].shape[1] for case in ALL["batchnorm"](TINY)) == sorted(widths)


def test_bytes_of_a_convolution_are_those_that_must_move():
    first, second, *_ = ALL["conv"](TINY)
    # Float32: 3 x 3 x 16 x 16 in, 2 x 3 x 4 x 4 weights, 3 x 2 x 8 x 8 out;
    # then 3 x 2 x 8 x 8 in, 4 x 2 x 4 x 4 weights, 3 x 4 x 4 x 4 out.
    x, w, y = 4 * 2304, 4 * 96, 4 * 384
    assert first.forward == Cost(None, x + w + y)
    assert first.both == Cost(None, 2 * (x + w + y))  # no gradient to photographs
    x, w, y = 4 * 384, 4 * 128, 4 * 192
    assert second.forward == Cost(None, x + w + y)
    assert second.both == Cost(None, 3 * (x + w + y))


def test_flops_of_both_passes_are_three_times_those_of_forward_where_all_gradients_are_taken():
    _, second, *_ = ALL["conv"](TINY)
    assert kernels.cost_of(second, "both").flops == 3 * kernels.cost_of(second, "forward").flops


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_we_have_does_what_the_reference_does(precision):
    """Relative norms, within a few roundings of the type; wide enough for the C kernels, where there are any."""
    torch.manual_seed(0)
    setting = Setting(batch=16, device=CPU, precision=precision, size=16, width=32, nz=5)
    for make in ALL.values():
        for case in make(setting):
            if not case.same:
                continue
            for pass_name in kernels.PASSES if case.both else ("forward",):
                ways = kernels.ways_of(case, ["ours"])
                wanted = kernels.result_of(case, pass_name, ways["eager"])
                # BatchNorm's dx under a dy of ones is what almost cancels: 64 roundings of float32.
                roundings = 64 if case.name.startswith("bn") and precision == "fp32" else 8
                for name, way in ways.items():
                    found = kernels.relative_error(kernels.result_of(case, pass_name, way), wanted)
                    assert found <= roundings * torch.finfo(setting.dtype).eps, (case.name, pass_name, name)


def test_names_of_cases_are_told_apart_and_lie_in_channels_last():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    for case in cases():
        for x in case.inputs:
            assert x.dim() != 4 or x.dtype == torch.uint8 or x.is_contiguous(memory_format=torch.channels_last), (
                case.name
            )


def test_the_error_is_a_share_of_the_norm():
    ones = torch.ones(4)
    assert kernels.relative_error([ones, 1.5 * ones], [ones, ones]) == 0.5
    assert kernels.relative_error([ones], [torch.zeros(4)]) == 2


def test_gradients_are_those_of_the_sum():
    x = torch.randn(2, 3, requires_grad=True)
    case = kernel_cases.Case("x", "2x3", F.silu, (x,), Cost(0, 0), Cost(0, 0))
    y, dx = kernels.both_of(case, Way(F.silu))()
    assert torch.equal(y, F.silu(x))
    assert torch.equal(dx, torch.autograd.grad(F.silu(x).sum(), x)[0])


def test_operations_are_measured_eager_compiled_and_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "GEMM_SIDES", (64,))
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 1 << 20})
    words = f"{SMALL} --pairs 2 --block-ms 0.1 --precision fp32 --results {tmp_path}"
    with torch.compiler.set_stance("force_eager"):  # what is compiled is the definition: compiling it takes 20 s
        assert kernels.main([*words.split(), "--only", "normalize", "--batch", "2,3"]) == 0
    assert kernels.main([*words.split(), "--only", "bn-leaky-*,conv-2-4", "--ways", "eager"]) == 0
    written = list(map(json.loads, (tmp_path / "kernels.jsonl").read_text().splitlines()))
    assert [row["batch_size"] for row in written] == [2, 2, 2, 3, 3, 3, 2, 2, 2, 2]
    rows = {row["variant"]: row for row in written}
    assert list(rows) == [
        "normalize/forward/eager", "normalize/forward/compile", "normalize/forward/custom",
        "bn-leaky-4/forward/eager", "bn-leaky-4/both/eager", "conv-2-4/forward/eager", "conv-2-4/both/eager",
    ]  # fmt: skip
    for row in rows.values():
        assert row["relative_error"] <= 1e-6
        assert row["fraction_of_bound"] == pytest.approx(row["bound_ms"] / row["ms"], rel=1e-3)
        assert row["images_per_s"] > 0
    compiled = rows["normalize/forward/compile"]
    low, high = compiled["ratio_to_eager_interval"]
    assert low <= compiled["ratio_to_eager"] <= high
    assert rows["normalize/forward/custom"]["ratio_to_compile"] > 0
    assert "conv-2-4/both/eager" in capsys.readouterr().out


def test_passes_that_come_too_late_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure", lambda *_: Machine(1e9, 1e9))
    assert kernels.main(f"{SMALL} --max-s 0.000001 --ways ours --no-record".split()) == 2
    said = capsys.readouterr().err
    assert "left out after --max-s 1e-06: normalize/forward at 2, gather/forward at 2, adam-ema/forward at 2" in said
    assert said.splitlines()[-1].startswith("benchmarks.kernels: error: --only must match an operation")


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_devices_time_that_counts():
    """A product of so many numbers takes a GPU longer than asking for it; a host that sleeps takes it nothing."""
    cuda = torch.device("cuda", 0)
    x = torch.randn(4096, 4096, device=cuda)
    alone = roofline.call_s(lambda: x @ x, 20, cuda)
    slow_host = roofline.call_s(lambda: (time.sleep(0.005), x @ x), 20, cuda)
    assert slow_host == pytest.approx(alone, rel=0.3)
    assert roofline.host_s(lambda: (time.sleep(0.005), x @ x), 5, cuda) >= 0.005
    machine = roofline.measure("bf16", cuda)
    assert machine.gemm_flops_per_s > 1e13
    assert machine.copy_bytes_per_s > 1e11


@pytest.mark.gpu
def test_every_operation_is_measured_on_a_gpu(tmp_path):
    words = f"--batch 8 --pairs 2 --block-ms 1 --device cuda --results {tmp_path} --ways eager,ours"
    assert kernels.main(words.split()) == 0
    rows = list(map(json.loads, (tmp_path / "kernels.jsonl").read_text().splitlines()))
    assert {row["operation"] for row in rows} >= {
        "normalize",
        "conv-leaky-3-64",
        "conv-transpose-tanh-64-3",
        "bn-leaky-128",
    }
    assert all(row["host_ms"] > 0 and row["ms"] > 0 for row in rows)
    assert {row["way"] for row in rows} >= {"eager", "custom", "triton"}
    assert all(row["relative_error"] <= 8 * torch.finfo(torch.bfloat16).eps for row in rows if "relative_error" in row)
