"""The networks with layers computed together by kernels/ train as they do with torch's."""

from typing import Any
from unittest import mock

import pytest
import torch

from pipeline import distributed, models
from pipeline.config import DistributedConfig, LossConfig
from pipeline.distributed import Ranks
from pipeline.models import Discriminator, Generator
from pipeline.players import Players
from pipeline.sampling import recalibrated
from pipeline.step import FastStep
from tests.players import BATCH, NZ, SIDE, assert_same, snapshot, tiny_players
from tests.ranks import run_ranks
from tests.test_gpu import data, make_step

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Of float32, over a step of tiny networks."""


def players(fused: bool, precision: Any = "fp32") -> Players:
    found = tiny_players(precision=precision, memory_format=torch.channels_last)
    for network in (found.generator, found.discriminator):
        network.batchnorm_act = network.image_ends = "triton" if fused else "torch"
    return found


def train(found: Players, precision: Any = "fp32", steps: int = 2, *, joint: bool = True, **also: Any) -> torch.Tensor:
    step = FastStep(found, precision, channels_last=True, ema_half_life_images=100, joint=joint, **also)
    random = torch.Generator().manual_seed(5)
    for i in range(steps):
        images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
        meters = step(images, torch.randn(BATCH, NZ, generator=random), 1000 + i * BATCH, BATCH)
    return meters


@pytest.mark.parametrize("joint", [True, False])
def test_a_step_has_the_same_losses_gradients_and_statistics(joint: bool):
    ours, theirs = players(True), players(False)
    with mock.patch.object(models, "batchnorm_act", wraps=models.batchnorm_act) as fused:
        meters = train(ours, steps=1, joint=joint)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.layers) for n in (ours.generator, ours.discriminator)]
    assert fused.call_count == norms[0] + norms[1] * (2 if joint else 3)
    torch.testing.assert_close(meters, train(theirs, steps=1, joint=joint), rtol=1e-5, atol=1e-6)
    for name in ("generator", "discriminator"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert list(one.state_dict()) == list(other.state_dict())
        for (key, mine), its in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6, msg=key)
        for (key, mine), its in zip(one.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7, msg=key)


def test_under_autocast_activations_are_bf16_and_losses_agree_within_its_rounding():
    found = players(True)
    with torch.autocast("cpu", torch.bfloat16):
        images = found.generator(torch.randn(BATCH, NZ))
        assert images.dtype == torch.bfloat16
        assert found.discriminator(images).dtype == torch.bfloat16
    ours, theirs = (train(players(fused, "bf16"), "bf16", steps=1) for fused in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0.02)


def test_penalties_which_need_a_second_derivative_are_torchs():
    loss = LossConfig(r1=1.0, gradient_penalty=1.0)
    found = players(True)
    torch.testing.assert_close(train(found, steps=1, loss=loss), train(players(False), steps=1, loss=loss), **CLOSE)
    assert (found.discriminator.batchnorm_act, found.discriminator.image_ends) == ("triton", "triton")


def test_evaluation_and_recalibration_take_torchs_batchnorm():
    generator = players(True).generator
    with mock.patch.object(models, "batchnorm_act", side_effect=AssertionError):
        recalibrated(generator, NZ, images=8, batch=4)
        generator.eval()(torch.randn(2, NZ))


def test_a_layer_is_fused_with_its_own_slope():
    torch.manual_seed(0)
    for network, given in ((Generator(4, 2, 3, 16, 16), torch.randn(3, 4)), (Discriminator(2, 3, 16, 16), None)):
        x = torch.randn(3, 3, 16, 16) if given is None else given
        expected = network(x)
        network.batchnorm_act = network.image_ends = "triton"
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_the_compiler_takes_it_without_a_graph_break():
    torch.manual_seed(0)
    network, plain = (Discriminator(2, 3, 16, 16) for _ in range(2))
    plain.load_state_dict(network.state_dict())
    network.batchnorm_act = network.image_ends = "triton"
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(4, 3, 16, 16)
    for part in (compiled, plain):
        part(x, num_groups=2).sum().backward()
    one, other = (each.state_dict(keep_vars=True) for each in (network, plain))
    for (key, mine), its in zip(one.items(), other.values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6, msg=key)
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_steps_agree_with_torchs_and_nothing_waits(arithmetic: Any):
    ours, theirs = (make_step(FastStep, arithmetic) for _ in range(2))
    for network in (ours.players.generator, ours.players.discriminator):
        network.batchnorm_act = network.image_ends = "triton"
    ours(*data(0), 0, 16)
    theirs(*data(0), 0, 16)
    torch.cuda.synchronize()
    images, latents = data(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ours(images, latents, 16, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounding = {"fp32": 1e-3, "bf16": 4e-2, "fp16": 2e-2}[arithmetic]
    torch.testing.assert_close(found, theirs(*data(1), 16, 16), rtol=rounding, atol=rounding)


def trains_alike(ranks: Ranks) -> None:
    found = players(True)
    for name in ("generator", "discriminator"):
        found.parallel[name] = distributed.wrap(getattr(found, name), ranks, DistributedConfig())
    step = FastStep(found, "fp32", channels_last=True, ema_half_life_images=100, joint=True)
    torch.manual_seed(ranks.rank + 1)
    for i in range(2):
        step(torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8), torch.randn(2, NZ), 1000 + i * 4, 4)
    shared = {k: v for k, v in snapshot(found)["discriminator"].items() if "running" not in k}
    for theirs in distributed.gather(shared):
        assert_same(theirs, shared)


def test_ranks_under_distributed_data_parallel_keep_equal_weights():
    run_ranks(trains_alike, 2)
