"""Step modes on a CUDA device: recorded and compiled steps against the eager one; `make test-gpu` runs these."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from pipeline import assembly
from pipeline.config import Config, DiscriminatorInputConfig, DistributedConfig, LossConfig, OptimConfig
from pipeline.distributed import Ranks
from pipeline.models import Discriminator, Generator, initialise
from pipeline.players import make_players
from pipeline.schedule import Schedule
from pipeline.step import FastStep
from pipeline.step_compiled import CompiledStep
from pipeline.step_graph import WARM_UP_STEPS, WARM_UP_STEPS_RANKS, GraphStep
from tests.test_step_modes import assert_alike, rates_of, state_of

pytestmark = pytest.mark.gpu

N, NZ, WIDTH, SIDE = 16, 20, 16, 64
STEPS = 3 * WARM_UP_STEPS + 4
# Relative norm of a difference after STEPS steps of the same kernels: atomics in cuDNN's weight gradients add up in any
# order, and Adam's first steps are signs; deterministic algorithms leave the rounding of rates and average alone.
TOLERANCE = {"fp32": 1e-3, "bf16": 4e-2, "fp16": 2e-2}
TECHNIQUES = {
    "plain": {},
    "schedule": {"schedule": Schedule("linear", 0.25, STEPS * N)},
    "noise": {"d_input": DiscriminatorInputConfig(noise=0.2, noise_images=(WARM_UP_STEPS + 3) * N)},
    "all": {
        "loss": LossConfig(kind="hinge", r1=1.0, r1_every=4, d_steps=2),
        "d_input": DiscriminatorInputConfig(augment=["color", "translation"]),
        "schedule": Schedule("cosine", 0.0, STEPS * N),
    },
}


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def make_step(kind, arithmetic="fp32", backend="torch", **options):
    random = torch.Generator().manual_seed(0)
    pair = Generator(NZ, WIDTH, 3, SIDE, SIDE), Discriminator(WIDTH, 3, SIDE, SIDE)
    for network in pair:
        initialise(network, random)
        network.to(device="cuda", memory_format=torch.channels_last)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cfg = OptimConfig(lr=2.0**-12, ema_half_life_images=5 * N, backend=backend)  # float32 holds that rate
    players = make_players(*pair, cfg, lr=cfg.lr, precision=arithmetic)
    for scaler in (players.scaler_d, players.scaler_g):
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    return kind(players, arithmetic, channels_last=True, ema_half_life_images=5 * N, joint=True, **options)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    pixels = torch.randint(0, 256, (N, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return pixels.cuda(), torch.randn(N, NZ, generator=random).cuda()


@pytest.mark.parametrize("techniques", TECHNIQUES)
@pytest.mark.parametrize("arithmetic", TOLERANCE)
def test_a_graph_equals_the_eager_step_with_average_and_rates(techniques, arithmetic):
    eager, graph = (make_step(kind, arithmetic, **TECHNIQUES[techniques]) for kind in (FastStep, GraphStep))
    tolerance = TOLERANCE[arithmetic]
    for i in range(STEPS):
        ours, theirs = (step(*data(i), i * N, N) for step in (graph, eager))
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance / 4), i
        assert rates_of(graph) == pytest.approx(rates_of(eager), rel=1e-6, abs=0)
    assert_alike(graph, eager, tolerance)
    assert any(recording.launch for recording in graph.recordings.values())


def test_a_graph_leaves_out_updates_that_are_not_finite_and_goes_on():
    step = make_step(GraphStep)
    for i in range(WARM_UP_STEPS + 2):
        step(*data(i), i * N, N)
    before = state_of(step)
    pixels, latents = data(5)
    assert not torch.isfinite(step(pixels, latents * torch.nan, 5 * N, N)[:2]).all()
    assert step.skipped.tolist() == [1, 1]
    assert step.hopeless > 0
    after = state_of(step)
    for name in before:
        if name != "ema" and "statistics" not in name:
            assert torch.equal(after[name], before[name]), name
    assert torch.isfinite(step(*data(6), 6 * N, N)).all()
    assert step.skipped.tolist() == [0, 0]


def test_an_overflow_in_fp16_within_a_graph_skips_one_players_step_and_halves_its_scale():
    step = make_step(GraphStep, "fp16")
    for i in range(WARM_UP_STEPS + 1):
        step(*data(i), i * N, N)
    step.players.scaler_d._scale.fill_(2.0**40)
    before = state_of(step)
    step(*data(5), 5 * N, N)
    assert step.players.scaler_d.get_scale() == 2.0**39
    assert torch.equal(state_of(step)["discriminator"], before["discriminator"])
    assert not torch.equal(state_of(step)["generator"], before["generator"])


@pytest.mark.parametrize("kind", [FastStep, GraphStep])
@pytest.mark.parametrize("arithmetic", TOLERANCE)
def test_our_adam_with_its_average_equals_torchs(arithmetic, kind):
    loss = LossConfig(d_steps=2)
    theirs, ours = make_step(FastStep, arithmetic, loss=loss), make_step(kind, arithmetic, "triton", loss=loss)
    tolerance = TOLERANCE[arithmetic]
    for i in range(STEPS):
        found, expected = (step(*data(i), i * N, N) for step in (ours, theirs))
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance / 4), i
    assert_alike(ours, theirs, tolerance)


@pytest.mark.parametrize("arithmetic", TOLERANCE)
def test_nothing_waits_for_the_device_once_a_step_is_recorded(arithmetic):
    step = make_step(GraphStep, arithmetic, schedule=Schedule("linear", 0.0, 100 * N))
    batches = [data(i) for i in range(WARM_UP_STEPS + 3)]
    for i, batch in enumerate(batches[:-1]):
        step(*batch, i * N, N)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meters = step(*batches[-1], 100 * N, N)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(meters).all()


@pytest.mark.parametrize("arithmetic", TOLERANCE)
def test_three_compiled_steps_equal_the_eager_ones(arithmetic):
    eager, compiled = (make_step(kind, arithmetic) for kind in (FastStep, CompiledStep))
    tolerance = TOLERANCE[arithmetic]
    for i in range(3):
        ours, theirs = (step(*data(i), i * N, N) for step in (compiled, eager))
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance / 4), i
    assert compiled.recompiles == 0
    assert all(p.grad is not None for p in compiled.players.discriminator.parameters())


def test_a_graph_of_many_ranks_equals_their_eager_step():
    """One rank over NCCL: the wrapper, its buckets and the exchange are in the graph as with many."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
        try:
            steps = [make_step(kind, "bf16") for kind in (FastStep, GraphStep)]
            for step in steps:
                two = Ranks(0, 2, 0, 2, device)  # so that it is wrapped; the group has one
                assembly.wrap_players(step, two, Config(distributed=DistributedConfig(bucket_cap_mb=0.05)))
            for i in range(WARM_UP_STEPS_RANKS + 4):
                theirs, ours = (step(*data(i), i * N, N) for step in steps)
                assert torch.allclose(ours, theirs, rtol=TOLERANCE["bf16"], atol=TOLERANCE["bf16"] / 4), i
            assert all(recording.launch for recording in steps[1].recordings.values())
            assert_alike(steps[1], steps[0], TOLERANCE["bf16"])
            steps[1].close()  # or the group would wait for its graph
        finally:
            torch.distributed.destroy_process_group()
