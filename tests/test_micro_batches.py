"""Parts of a batch in turn are the ranks of a batch: the oracle of tests/test_step.py, W groups of statistics."""

import pytest
import torch
from torch import nn

from pipeline.assembly import make_plan
from pipeline.cli.options import parse
from pipeline.config import Config, ConfigError, DistributedConfig, LossConfig, TrainConfig
from pipeline.distributed import Ranks, wrap
from pipeline.micro_batches import MicroBatchStep
from pipeline.order import Slice
from pipeline.step import METERS, FastStep
from tests.ranks import run_ranks
from tests.test_step import (
    TOLERANCE,
    N,
    OneStatisticARank,
    data,
    make_step,
    networks,
    one_process,
    relative,
)

MOMENTUM = 0.1


def holds_against_the_oracle(step, oracle, shard=None, num_steps: int = 3) -> None:
    shard = shard or Slice(N)
    for i in range(num_steps):
        pixels, latents = data(i)
        expected = oracle(pixels, latents, i * N, N)
        mine = slice(shard.rank * shard.per_rank, (shard.rank + 1) * shard.per_rank)
        meters = step(pixels[mine], latents[mine], i * N, N, torch.from_numpy(shard.numbers(i * N)))
        if shard.world_size > 1:
            torch.distributed.all_reduce(meters)
            meters, expected = meters[:5] / shard.world_size, expected[:5]
        assert torch.allclose(meters, expected, rtol=1e-4, atol=1e-5), (i, dict(zip(METERS, meters, strict=False)))
        assert step.caught.keys() == oracle.caught.keys() == {"d", "g"}
        for name in step.caught:
            assert relative(step.caught[name], oracle.caught[name]) < TOLERANCE["fp32"], (i, name)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(gradient_penalty=10.0, r1=1.0, r1_every=2)])
def test_parts_equal_one_process_with_as_many_groups_of_statistics(joint, loss):
    step = make_step(MicroBatchStep, networks(), joint=joint, loss=loss, micro_batch=N // 4)
    oracle = make_step(FastStep, one_process(4, spectral_norm=False), loss=loss)
    before = [m.running_mean.clone() for m in step.players.generator.layers if isinstance(m, nn.BatchNorm2d)]
    holds_against_the_oracle(step, oracle, num_steps=1)
    assert torch.allclose(step.penalty, oracle.penalty, rtol=1e-3)
    # Running statistics: moved by each part in turn; the oracle's groups have moved by one of them each.
    mine = [m for m in step.players.generator.layers if isinstance(m, nn.BatchNorm2d)]
    theirs = [m for m in oracle.players.generator.layers if isinstance(m, OneStatisticARank)]
    for start, layer, groups in zip(before, mine, theirs, strict=True):
        expected = start
        for group in groups.ranks:
            mean = (group.running_mean - (1 - MOMENTUM) * start) / MOMENTUM
            expected = (1 - MOMENTUM) * expected + MOMENTUM * mean
        assert torch.allclose(layer.running_mean, expected, rtol=1e-3, atol=1e-5)
        assert layer.num_batches_tracked == 4
    holds_against_the_oracle(step, oracle)


def test_one_part_is_the_whole_batch_to_the_bit():
    for precision in ("fp32", "bf16", "fp16"):
        whole = make_step(FastStep, networks(), precision, half_life=100)
        parts = make_step(MicroBatchStep, networks(), precision, half_life=100, micro_batch=N)
        for i in range(3):
            assert torch.equal(whole(*data(i), i * N, N), parts(*data(i), i * N, N))
        for network in ("generator", "discriminator"):
            states = [getattr(each.players, network).state_dict() for each in (whole, parts)]
            assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), network


def test_a_number_that_is_not_finite_in_one_part_leaves_the_whole_update_out():
    step = make_step(MicroBatchStep, networks(), micro_batch=N // 2)
    before = {name: value.clone() for name, value in step.players.discriminator.state_dict().items()}
    pixels, latents = data(0)
    latents[0] = torch.nan
    step(pixels, latents, 0, N)
    assert step.skipped.tolist() == [1, 1]
    after = step.players.discriminator.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if value.is_floating_point())


def two_ranks_of_two_parts(ranks: Ranks) -> None:
    oracle = make_step(FastStep, one_process(2 * ranks.world_size, spectral_norm=False))
    step = make_step(MicroBatchStep, networks(), micro_batch=N // 2 // ranks.world_size)
    sent = {}
    for name in ("generator", "discriminator"):
        wrapped = wrap(getattr(step.players, name), ranks, DistributedConfig(bucket_cap_mb=100))
        sent[name] = counted(wrapped)
        step.players.parallel[name] = wrapped
    holds_against_the_oracle(step, oracle, Slice(N, ranks.rank, ranks.world_size))
    assert {name: len(each) for name, each in sent.items()} == {"generator": 3, "discriminator": 3}


def counted(wrapped) -> list[int]:
    """Grows by one with each bucket that goes to the other ranks."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.buffer().numel())
        return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    return sent


def test_on_many_ranks_gradients_travel_once_a_network_and_step():
    run_ranks(two_ranks_of_two_parts, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.micro_batch", "1"], "train.micro_batch must be 0 or at least 2, got 1"),
        (["--train.micro_batch", "-4"], "train.micro_batch must be 0 or at least 2, got -4"),
    ],
)
def test_a_part_that_no_batchnorm_can_use_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_a_part_that_does_not_divide_a_ranks_batch_is_refused_in_one_line():
    cfg = Config(train=TrainConfig(batch_size=128, micro_batch=48))
    with pytest.raises(ConfigError, match=r"train\.micro_batch must divide the 64 images of a rank's batch, got 48"):
        cfg.per_rank(2)
    with pytest.raises(ConfigError, match=r"train\.mode must be eager with train\.micro_batch, got 'reference'"):
        make_plan(Config(train=TrainConfig(micro_batch=2, mode="reference")), None, None)
    with pytest.raises(ConfigError, match=r"distributed\.overlap_g must be false with train\.micro_batch, got True"):
        make_plan(Config(train=TrainConfig(micro_batch=2), distributed=DistributedConfig(overlap_g=True)), None, None)
