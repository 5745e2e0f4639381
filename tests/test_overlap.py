"""What travels between ranks and when: bf16 gradients, and G's while D looks at the next real images."""

import pytest
import torch
import torch.distributed as dist

from pipeline.assembly import wrap_players
from pipeline.checkpoint import snapshot
from pipeline.config import Config, ConfigError, DistributedConfig, LossConfig
from pipeline.distributed import Ranks, require_compression, wrap
from pipeline.order import Slice
from pipeline.overlap import OverlappedStep
from pipeline.schedule import Schedule
from pipeline.step import FastStep
from tests.commands import assert_bit_equal, state_of
from tests.numbered import words, write_numbered
from tests.players import assert_same
from tests.ranks import Launch, run_launches, run_ranks
from tests.test_micro_batches import counted
from tests.test_step import data, make_step, networks, relative

BF16 = 2.0**-8
"""Half of the distance between two neighbours in bf16, relative."""


def stepping(ranks: Ranks, kind, batch: int, precision="fp32", finish_each=False, cfg=None, spoilt=(), **options):
    """Some steps of this arrangement on these ranks, and what they leave."""
    step = make_step(kind, networks(), precision, half_life=100, **options)
    wrap_players(step, ranks, Config(distributed=cfg or DistributedConfig(bucket_cap_mb=0.01)))
    shard = Slice(batch, ranks.rank, ranks.world_size)
    hopeless, meters = [], []
    for i in range(5):
        pixels, latents = data(i, batch)
        mine = slice(shard.rank * shard.per_rank, (shard.rank + 1) * shard.per_rank)
        z = latents[mine].clone()
        if i in spoilt and ranks.rank == 0:
            z[0] = torch.nan
        numbers = torch.from_numpy(shard.numbers(i * batch))
        meters.append(step(pixels[mine], z, i * batch, batch, numbers))
        hopeless.append(float(step.hopeless))
        if finish_each:
            step.finish()
    step.finish()
    return step, snapshot(step.players, []), hopeless, torch.stack(meters)


def overlapped_equals_fast(ranks: Ranks) -> None:
    batch = 4 * ranks.world_size
    late = DistributedConfig(bucket_cap_mb=0.01, overlap_g=True)
    cases = [
        {},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"guarded": False},
        {"loss": LossConfig(d_steps=2, gradient_penalty=1.0)},
        {"schedule": Schedule("linear", 0.0, 10 * batch)},
        {"finish_each": True},
    ]
    for case in cases:
        _, expected, _, their_meters = stepping(ranks, FastStep, batch, **case)
        _, found, _, meters = stepping(ranks, OverlappedStep, batch, cfg=late, **case)
        assert_same(found, expected)
        assert torch.equal(meters, their_meters), case
    # Nothing is lost of what was not finite, though of G it is known a step later.
    _, expected, theirs, _ = stepping(ranks, FastStep, batch, spoilt=(1, 3))
    _, found, ours, _ = stepping(ranks, OverlappedStep, batch, cfg=late, spoilt=(1, 3))
    assert_same(found, expected)
    assert [h > 0 for h in theirs] == [False, True, False, True, False]
    assert [h > 0 for h in ours] == [False, True, False, True, False]
    if ranks.world_size == 2:
        rounded = DistributedConfig(bucket_cap_mb=0.01, compress="bf16")
        _, expected, *_ = stepping(ranks, FastStep, batch, cfg=rounded)
        both = DistributedConfig(bucket_cap_mb=0.01, compress="bf16", overlap_g=True)
        assert_same(stepping(ranks, OverlappedStep, batch, cfg=both)[1], expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_moments_and_meters_are_the_same_to_the_bit_when_gs_gradients_travel_late(world_size):
    run_ranks(overlapped_equals_fast, world_size)


def gradients_round_to_bf16(ranks: Ranks) -> None:
    batch = 4 * ranks.world_size
    caught = []
    for compress in ("none", "bf16"):
        step = make_step(FastStep, networks())
        wrap_players(step, ranks, Config(distributed=DistributedConfig(bucket_cap_mb=0.01, compress=compress)))
        pixels, latents = data(0, batch)
        mine = slice(4 * ranks.rank, 4 * ranks.rank + 4)
        step(pixels[mine], latents[mine], 0, batch)
        caught.append(step.caught)
    # Each summand is rounded once and so is their sum; G's gradients come from a D that has moved by other ones.
    exact, rounded = (each["d"] for each in caught)
    assert 0 < relative(rounded, exact) < 2 * BF16
    assert torch.equal(rounded, rounded.bfloat16().float())
    everyones = [torch.empty_like(rounded) for _ in range(ranks.world_size)]
    dist.all_gather(everyones, rounded)
    assert all(torch.equal(each, rounded) for each in everyones)


def travels_once(ranks: Ranks) -> None:
    """One bucket a network, one journey of it a step: D learns from two forward passes and one backward."""
    step = make_step(FastStep, networks())
    sent = {}
    for name in ("generator", "discriminator"):
        network = getattr(step.players, name)
        step.players.parallel[name] = wrapped = wrap(network, ranks, DistributedConfig(bucket_cap_mb=100))
        sent[name] = counted(wrapped), sum(p.numel() for p in network.parameters())
    for i in range(3):
        pixels, latents = data(i, 8)
        step(pixels[4 * ranks.rank :][:4], latents[4 * ranks.rank :][:4], 8 * i, 8)
    for buckets, numbers in sent.values():
        assert buckets == [numbers] * 3


def what_travels(ranks: Ranks) -> None:
    gradients_round_to_bf16(ranks)
    travels_once(ranks)


def test_gradients_travel_once_a_network_and_step_and_in_bf16_where_asked_for():
    run_ranks(what_travels, 2)


def test_an_nccl_that_cannot_add_up_bf16_is_refused(monkeypatch):
    cfg = DistributedConfig(compress="bf16")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 9, 6))
    with pytest.raises(ConfigError, match=r"distributed\.compress must be none where NCCL is older than 2\.10"):
        require_compression(cfg, Ranks(0, 2, 0, 2, torch.device("cuda", 0)))
    require_compression(cfg, Ranks(0, 2, 0, 2, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    require_compression(cfg, Ranks(0, 2, 0, 2, torch.device("cuda", 0)))


def test_a_run_whose_gs_gradients_travel_late_leaves_the_same_checkpoints(tmp_path):
    """Each of them, in one go or in two: a checkpoint has G's last update in it."""
    images = write_numbered(tmp_path / "images", 6)
    settings = {"train__max_images": 24, "checkpoint__every_images": 8, "log__grid_every_images": 8}
    launches = [
        Launch(2, words(images, tmp_path / "plain", **settings)),
        Launch(2, words(images, tmp_path / "late", distributed__overlap_g="true", **settings)),
        Launch(
            2, words(images, tmp_path / "parts", distributed__overlap_g="true", **settings | {"train__max_images": 8})
        ),
        Launch(2, words(images, tmp_path / "parts", distributed__overlap_g="true", **settings)),
    ]
    assert run_launches(launches) == [[0, 0]] * 4
    for seen in (8, 16, 24):
        for run in ("late", "parts"):
            assert_bit_equal(state_of(tmp_path / run, seen), state_of(tmp_path / "plain", seen))
