"""Ours against the tutorial's algorithm, said again in 40 plain lines: equal losses, gradients, running statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import DistributedConfig, OptimConfig
from pipeline.distributed import wrap
from pipeline.losses import Losses, generator_loss
from pipeline.models import Discriminator, Generator, initialise
from pipeline.order import Slice
from pipeline.players import make_players
from pipeline.precision import dtype_of
from pipeline.step import METERS, FastStep, ReferenceStep
from tests.ranks import run_ranks

N, NZ, WIDTH, SIDE = 8, 10, 8, 32
TUTORIALS = METERS[:5]
"""The other meters are not the tutorial's."""
# Relative norm of a difference to the same algorithm in the same arithmetic: sums in another order, rounded to 24 or to
# 8 bits.  Gradients in bf16 have no such bound (D's first step of Adam is its gradient's sign, which rounding flips
# near 0): there the distance to float32 is held against the tutorial's own distance in bf16.
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}
AS_CLOSE_AS_THE_TUTORIAL = 1.25


def networks(seed: int = 0, spectral_norm: bool = False, width: int = WIDTH) -> tuple[Generator, Discriminator]:
    random = torch.Generator().manual_seed(seed)
    pair = Generator(NZ, width, 3, SIDE, SIDE), Discriminator(width, 3, SIDE, SIDE, spectral_norm=spectral_norm)
    for network in pair:
        initialise(network, random)
    return pair


def data(step: int, images: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    pixels = torch.randint(0, 256, (images, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return pixels, torch.randn(images, NZ, generator=random)


def tutorial_steps(
    generator: nn.Module, discriminator: nn.Module, num_steps: int, precision: str, images: int = N
) -> list[dict]:
    """Real, fake, D's step, fake again, G's step; BCE with labels 1 and 0, channels first."""
    with torch.autocast("cpu", dtype_of(precision), enabled=precision != "fp32", cache_enabled=False):
        return _tutorial_steps(generator, discriminator, num_steps, images)


def _tutorial_steps(generator: nn.Module, discriminator: nn.Module, num_steps: int, images: int) -> list[dict]:
    adam_g, adam_d = (torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in (generator, discriminator))
    found = []
    for step in range(num_steps):
        pixels, latents = data(step, images)
        real = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        discriminator.zero_grad()
        output = discriminator(real)
        loss_real = F.binary_cross_entropy_with_logits(output.float(), ones)
        loss_real.backward()
        d_real = torch.sigmoid(output).mean().item()
        fake = generator(latents)
        output = discriminator(fake.detach())
        loss_fake = F.binary_cross_entropy_with_logits(output.float(), zeros)
        loss_fake.backward()
        before = torch.sigmoid(output).mean().item()
        gradients_d = gradients(discriminator)
        adam_d.step()
        generator.zero_grad()
        output = discriminator(fake)
        loss_g = F.binary_cross_entropy_with_logits(output.float(), ones)
        loss_g.backward()
        gradients_g = gradients(generator)
        after = torch.sigmoid(output).mean().item()
        adam_g.step()
        meters = (loss_real.item() + loss_fake.item(), loss_g.item(), d_real, before, after)
        found.append({"meters": dict(zip(TUTORIALS, meters, strict=True)), "d": gradients_d, "g": gradients_g})
    return found


def gradients(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in network.parameters()])


def buffers(network: nn.Module) -> torch.Tensor:
    return torch.cat([b.double().flatten() for b in network.buffers()])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def make_step(kind, pair, precision="fp32", joint=False, channels_last=True, half_life=0, optim=None, **options):
    if channels_last:
        pair = [n.to(memory_format=torch.channels_last) for n in pair]
    cfg = optim or OptimConfig(ema_half_life_images=half_life)
    players = make_players(*pair, cfg, lr=cfg.lr, precision=precision)
    step = kind(players, precision, channels_last=channels_last, ema_half_life_images=half_life, joint=joint, **options)
    step.caught = {}
    for name in ("g", "d"):
        optimizer = getattr(players, f"optimizer_{name}")
        network = players.generator if name == "g" else players.discriminator
        optimizer.register_step_pre_hook(
            lambda *_, name=name, network=network: step.caught.__setitem__(name, gradients(network))
        )
    return step


CASES = [
    pytest.param(ReferenceStep, "fp32", False, True, id="reference-fp32"),
    pytest.param(FastStep, "fp32", False, True, id="fast-fp32"),
    pytest.param(FastStep, "fp32", False, False, id="fast-fp32-contiguous"),
    pytest.param(FastStep, "fp32", True, True, id="fast-fp32-joint"),
    pytest.param(FastStep, "bf16", False, True, id="fast-bf16"),
    pytest.param(FastStep, "bf16", True, True, id="fast-bf16-joint"),
]


@pytest.mark.parametrize(("kind", "precision", "joint", "channels_last"), CASES)
def test_three_steps_equal_the_tutorials(kind, precision, joint, channels_last):
    theirs = networks()
    expected = tutorial_steps(*theirs, 3, precision)
    in_float32 = tutorial_steps(*networks(), 1, "fp32")
    step = make_step(kind, networks(), precision, joint, channels_last)
    tolerance = TOLERANCE[precision]
    for i in range(3):
        meters = dict(zip(METERS, step(*data(i), i * N, N).tolist(), strict=True))
        for name, value in expected[i]["meters"].items():
            assert meters[name] == pytest.approx(value, rel=tolerance, abs=tolerance / 4), (i, name)
        for name in ("d", "g"):
            if precision == "fp32":
                assert relative(step.caught[name], expected[i][name]) < tolerance, (i, name)
            elif i == 0:
                exact = in_float32[i][name]
                bound = AS_CLOSE_AS_THE_TUTORIAL * relative(expected[i][name], exact)
                assert relative(step.caught[name], exact) < bound, (i, name)
    assert relative(buffers(step.players.generator), buffers(theirs[0])) < tolerance
    assert relative(buffers(step.players.discriminator), buffers(theirs[1])) < tolerance


def test_fp16_takes_the_same_steps_behind_its_scalers():
    expected = tutorial_steps(*networks(), 2, "fp16")
    step = make_step(FastStep, networks(), "fp16")
    for scaler in (step.players.scaler_d, step.players.scaler_g):
        scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    for i in range(2):
        meters = dict(zip(METERS, step(*data(i), i * N, N).tolist(), strict=True))
        assert {k: meters[k] for k in TUTORIALS} == pytest.approx(expected[i]["meters"], rel=2e-2, abs=5e-3)
    assert step.players.scaler_d.state_dict()["_growth_tracker"] == 2
    assert step.players.scaler_g.get_scale() == step.players.scaler_d.get_scale() == 256


def test_an_overflow_in_fp16_skips_one_players_step_and_halves_its_scale():
    step = make_step(FastStep, networks(), "fp16")
    step.players.scaler_g.load_state_dict(step.players.scaler_g.state_dict() | {"scale": 256.0})
    step.players.scaler_d.load_state_dict(step.players.scaler_d.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(step.players.discriminator.state_dict())
    step(*data(0), 0, N)
    assert step.players.scaler_d.get_scale() == 2.0**39
    assert step.players.scaler_g.get_scale() == 256
    for name, p in step.players.discriminator.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [ReferenceStep, FastStep])
def test_looking_for_numbers_that_are_not_finite_changes_no_bit_of_a_healthy_training(kind, precision):
    guarded, plain = (make_step(kind, networks(), precision, half_life=100, guarded=g) for g in (True, False))
    for i in range(4):
        assert torch.equal(guarded(*data(i), i * N, N), plain(*data(i), i * N, N))
    for network in ("generator", "discriminator"):
        states = [getattr(step.players, network).state_dict() for step in (guarded, plain)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for optimizer in ("optimizer_g", "optimizer_d"):
        moments = [getattr(step.players, optimizer).state_dict()["state"] for step in (guarded, plain)]
        assert all(torch.equal(m[key], moments[1][i][key]) for i, m in moments[0].items() for key in m)
    assert all(torch.equal(value, plain.players.ema[name]) for name, value in guarded.players.ema.items())
    assert guarded.skipped.tolist() == [0, 0]
    assert guarded.hopeless == 0


@pytest.mark.parametrize("kind", [ReferenceStep, FastStep])
def test_without_looking_a_number_that_is_not_finite_spoils_the_networks(kind):
    """What the look is for."""
    for guarded, spoilt in ((True, False), (False, True)):
        step = make_step(kind, networks(), guarded=guarded)
        pixels, latents = data(0)
        meters = step(pixels, latents * torch.nan, 0, N)
        assert not torch.isfinite(meters[:2]).all()
        for network in (step.players.generator, step.players.discriminator):
            assert all(p.isfinite().all() for p in network.parameters()) is not spoilt
            assert buffers(network).isfinite().all() != spoilt


def test_images_that_lie_far_apart_show_in_the_spread():
    step = make_step(FastStep, networks())
    same = torch.full((N, SIDE, SIDE, 3), 200, dtype=torch.uint8)
    halves = same.clone()
    halves[: N // 2] = 0
    _, latents = data(0)
    spreads = [step(images, latents, i * N, N)[-2:].tolist() for i, images in enumerate((same, halves))]
    assert spreads[0][0] == pytest.approx(0, abs=1e-6)
    assert spreads[1][0] == pytest.approx(100 / 127.5)  # half of them 0, half 200
    assert all(fake > 0 for _, fake in spreads)


def test_gradients_return_to_d_after_gs_half():
    step = make_step(FastStep, networks())
    step(*data(0), 0, N)
    assert all(p.requires_grad and p.grad is not None for p in step.players.discriminator.parameters())


def test_the_losses_are_the_ones_of_binary_cross_entropy_and_stay_finite_far_out():
    logits = torch.tensor([-200.0, -3.0, 0.0, 3.0, 200.0])
    ones, zeros = torch.ones(5), torch.zeros(5)
    bce = F.binary_cross_entropy_with_logits
    assert torch.allclose(generator_loss(logits), bce(logits, ones))
    assert torch.allclose(Losses().discriminator(logits, -logits), bce(logits, ones) + bce(-logits, zeros))
    assert generator_loss(logits.bfloat16()).dtype == torch.float32


def test_the_average_halves_an_older_generator_after_its_half_life():
    step = make_step(FastStep, networks(), half_life=100)
    players = step.players
    first = {k: v.clone() for k, v in players.ema.items()}
    with torch.no_grad():
        for p in players.generator.parameters():
            p.add_(1.0)
    for _ in range(10):
        step.average(images_seen=1_000_000, batch_size=10)
    for name, p in players.generator.named_parameters():
        assert torch.allclose(players.ema[name], (first[name] + p) / 2, atol=1e-6)
    step.average(images_seen=0, batch_size=10)
    assert all(torch.equal(players.ema[k], p) for k, p in players.generator.named_parameters())


class OneStatisticARank(nn.Module):
    """The oracle's BatchNorm: one process, the batch in as many groups as there are ranks, each with its statistics."""

    def __init__(self, layer: nn.BatchNorm2d, world_size: int) -> None:
        super().__init__()
        self.ranks = nn.ModuleList(copy.deepcopy(layer) for _ in range(world_size))
        self.weight, self.bias = layer.weight, layer.bias
        for one in self.ranks:
            one.weight, one.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([one(part) for one, part in zip(self.ranks, x.chunk(len(self.ranks)), strict=True)])


def one_process(world_size: int, spectral_norm: bool):
    pair = networks(spectral_norm=spectral_norm)
    for network in pair:
        for i, layer in enumerate(network.layers):
            if isinstance(layer, nn.BatchNorm2d):
                network.layers[i] = OneStatisticARank(layer, world_size)
    return pair


def ranks_equal_the_oracle(ranks, joint, kind=FastStep, spectral_norm=False, **options):
    oracle = make_step(kind, one_process(ranks.world_size, spectral_norm), **options)
    step = make_step(kind, networks(spectral_norm=spectral_norm), joint=joint, **options)
    for name in ("generator", "discriminator"):
        step.players.parallel[name] = wrap(getattr(step.players, name), ranks, DistributedConfig(bucket_cap_mb=0.01))
    shard = Slice(N, ranks.rank, ranks.world_size)
    for i in range(3):
        pixels, latents = data(i)
        expected = oracle(pixels, latents, i * N, N)
        mine = slice(shard.rank * shard.per_rank, (shard.rank + 1) * shard.per_rank)
        meters = step(pixels[mine], latents[mine], i * N, N, torch.from_numpy(shard.numbers(i * N)))
        torch.distributed.all_reduce(meters)
        # How far images lie apart within a rank's share is less than within the whole batch; the rest are means.
        means, expected = (meters / ranks.world_size)[: len(TUTORIALS)], expected[: len(TUTORIALS)]
        assert torch.allclose(means, expected, rtol=1e-4, atol=1e-5), (i, means, expected)
        assert step.caught.keys() == oracle.caught.keys()
        for name in step.caught:
            assert relative(step.caught[name], oracle.caught[name]) < 2e-4, (i, name)
    # Statistics: this rank's are the oracle's group of the same number.
    for network in ("generator", "discriminator"):
        mine_layers = [m for m in getattr(step.players, network).layers if isinstance(m, nn.BatchNorm2d)]
        their_layers = [m for m in getattr(oracle.players, network).layers if isinstance(m, OneStatisticARank)]
        for mine_layer, theirs in zip(mine_layers, their_layers, strict=True):
            group = theirs.ranks[ranks.rank]
            assert torch.allclose(mine_layer.running_mean, group.running_mean, rtol=1e-3, atol=1e-5)
            assert torch.allclose(mine_layer.running_var, group.running_var, rtol=1e-3, atol=1e-5)
    # Weights: equal over the ranks to the bit.
    for network in (step.players.generator, step.players.discriminator):
        flat = torch.cat([p.detach().flatten() for p in network.parameters()])
        first = flat.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(flat, first)


def both_arrangements_equal_the_oracle(ranks):
    ranks_equal_the_oracle(ranks, joint=False)
    ranks_equal_the_oracle(ranks, joint=True)


def test_two_ranks_equal_one_process_with_two_groups_of_statistics():
    run_ranks(both_arrangements_equal_the_oracle, 2)
