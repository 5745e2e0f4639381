import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from pipeline import checkpoint as checkpoints
from pipeline import distributed
from pipeline.config import ConfigError, DistributedConfig, OptimConfig, num_halvings
from pipeline.distributed import Ranks
from pipeline.models import (
    Discriminator,
    Generator,
    GroupedBatchNorm2d,
    SpectralNorm,
    forward_flops,
    initialise,
    step_flops,
)
from pipeline.players import Players, make_players
from pipeline.step import FastStep, ReferenceStep
from tests.players import assert_same, snapshot, train_some
from tests.ranks import run_ranks


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_at_64_pixels_they_are_the_tutorials_networks():
    generator, discriminator = Generator(100, 64, 3, 64, 64), Discriminator(64, 3, 64, 64)
    assert (count(generator), count(discriminator)) == (3_576_704, 2_765_568)
    kinds = [type(m).__name__.replace("Grouped", "") for m in generator.layers]
    assert kinds == ["ConvTranspose2d", *["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 4]
    kinds = [type(m).__name__.replace("Grouped", "") for m in discriminator.layers]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3, "Conv2d"]


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 64), (128, 128), (64, 96), (80, 48), (28, 28), (16, 64)])
@pytest.mark.parametrize("nc", [1, 3, 4])
def test_any_size_comes_out_as_asked_for(size, nc):
    images = Generator(7, 2, nc, *size)(torch.randn(2, 7))
    assert images.shape == (2, nc, *size)
    assert images.abs().max() <= 1
    assert Discriminator(2, nc, *size)(images).shape == (2,)


def test_widths_stop_at_eight_times_the_base():
    widths = [m.num_features for m in Generator(7, 2, 3, 256, 256).layers if isinstance(m, nn.BatchNorm2d)]
    assert widths == [16, 16, 16, 8, 4, 2]


@pytest.mark.parametrize("size", [(66, 66), (64, 68), (4, 4)])
def test_a_size_that_does_not_halve_is_refused(size):
    with pytest.raises(ConfigError, match=r"data\.image_size") if min(size) >= 8 else pytest.raises(ConfigError):
        if min(size) < 8:
            from pipeline.config import DataConfig

            DataConfig(image_size=list(size))
        num_halvings(*size)


def test_initial_weights_have_the_papers_spread():
    generator = Generator(100, 64, 3, 64, 64)
    initialise(generator, torch.Generator().manual_seed(1))
    convolution, norm = generator.layers[0].weight, generator.layers[1]
    assert abs(convolution.std() - 0.02) < 1e-3
    assert abs(norm.weight.mean() - 1) < 0.01
    assert abs(norm.weight.std() - 0.02) < 5e-3
    assert not norm.bias.any()


def test_groups_are_separate_batches_to_batchnorm():
    torch.manual_seed(0)
    one, other = GroupedBatchNorm2d(6), nn.BatchNorm2d(6)
    x = torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().clone().requires_grad_()
    one.num_groups = 2
    joint, separate = one(x), torch.cat([other(y[:4]), other(y[4:])])
    gradient = torch.randn_like(joint)
    joint.backward(gradient)
    separate.backward(gradient)
    assert torch.equal(joint, separate)
    assert torch.equal(x.grad, y.grad)
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (64, 96)])
def test_flops_are_what_torch_counts(size):
    generator, discriminator = Generator(100, 64, 3, *size), Discriminator(64, 3, *size)
    latents, images = torch.randn(2, 100), torch.randn(2, 3, *size)
    for network, inputs in ((generator, latents), (discriminator, images)):
        with FlopCounterMode(display=False) as counter:
            network(inputs)
        assert counter.get_total_flops() == 2 * sum(forward_flops(network, *size))
    with FlopCounterMode(display=False) as counter:
        fake = generator(latents)
        (discriminator(images).sum() + discriminator(fake.detach()).sum()).backward()
        discriminator.requires_grad_(False)
        discriminator(fake).sum().backward()
    assert counter.get_total_flops() == 2 * step_flops(generator, discriminator, *size)


def test_a_reference_step_costs_2274_megaflop_an_image():
    flops = step_flops(Generator(100, 64, 3, 64, 64), Discriminator(64, 3, 64, 64), 64, 64)
    assert round(flops / 1e6, 1) == 2274.6


def normed(width: int = 4, side: int = 16, seed: int = 1, **also: bool) -> Discriminator:
    network = Discriminator(width, 3, side, side, **({"spectral_norm": True} | also))
    initialise(network, torch.Generator().manual_seed(seed))
    return network


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d)]


def test_spectral_norm_is_torchs_value_and_gradient_from_the_same_singular_vectors():
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    ours = SpectralNorm(weight)
    convolution = nn.Conv2d(3, 6, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        convolution.weight.copy_(weight)
    theirs = parametrizations.spectral_norm(convolution).parametrizations.weight
    theirs[0]._u.copy_(ours.u)
    theirs[0]._v.copy_(ours.v)
    for _ in range(3):
        one, other = weight.clone().requires_grad_(), theirs.original
        other.grad = None
        gradient = torch.randn_like(weight)
        for given, result in ((one, ours(one)), (other, convolution.weight)):
            (result * gradient).sum().backward()
            assert given.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours(weight), convolution.weight.detach(), rtol=1e-12, atol=1e-14)


def test_spectral_norm_makes_the_largest_singular_value_one():
    network = normed(8, 32)
    for _ in range(100):
        network(torch.randn(2, 3, 32, 32))
    for convolution in convolutions(network):
        largest = torch.linalg.svdvals(convolution.weight.double().flatten(1)).max()
        assert abs(largest - 1) < 1e-3  # two singular values may lie so close that the iterations do not part them


def test_spectral_norm_leaves_the_initial_weights_and_is_the_same_on_every_rank():
    plain = convolutions(normed(spectral_norm=False))
    torch.manual_seed(1)
    one = normed().eval()
    torch.manual_seed(2)
    other = normed().eval()
    for convolution, expected in zip(convolutions(one), plain, strict=True):
        assert torch.equal(convolution.parametrizations.weight.original, expected.weight)
        assert not torch.equal(convolution.weight, expected.weight)
    assert_same(one.state_dict(), other.state_dict())
    assert count(one) == count(normed(spectral_norm=False))


def test_spectral_norm_survives_saving_copying_and_looking():
    network, images = normed().eval(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(network.state_dict())
    logits = network(images)
    assert_same(network.state_dict(), before)  # eval mode moves no singular vector
    other = normed(seed=2).eval()
    assert not torch.equal(other(images), logits)
    other.load_state_dict(before)
    assert torch.equal(other(images), logits)
    assert torch.equal(copy.deepcopy(network)(images), logits)
    with pytest.raises(RuntimeError, match="parametrizations"):
        normed(spectral_norm=False).load_state_dict(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_passes_before_one_backward_and_low_precision_leave_spectral_norm_exact(memory_format):
    network = normed().to(memory_format=memory_format)
    images = torch.randn(2, 4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = convolutions(network)[1].weight
        (network(images[0]).float().sum() + network(images[1]).float().sum()).backward()
    assert low.dtype == torch.float32
    largest = torch.linalg.svdvals(low.detach().double().flatten(1)).max()
    assert 1 <= largest + 1e-6 <= 1.02, "one power iteration more, in float32"
    for convolution in convolutions(network):
        parameter = convolution.parametrizations.weight.original
        assert parameter.grad.stride() == parameter.stride()
        # A weight as a whole scaled up gives the same function: the gradient has no part along it.
        assert (parameter.grad * parameter).sum().abs() < 0.02 * parameter.grad.norm() * parameter.norm()


def test_flops_leave_the_power_iterations_out_and_reading_them_moves_nothing():
    network = normed(8, 32)
    before = copy.deepcopy(network.state_dict())
    plain = Discriminator(8, 3, 32, 32)
    assert forward_flops(network, 32, 32) == forward_flops(plain, 32, 32)
    assert_same(network.state_dict(), before)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, 3, 32, 32))
    assert counter.get_total_flops() == 2 * sum(forward_flops(plain, 32, 32))


def normed_players(seed: int = 0) -> Players:
    generator = Generator(4, 2, 3, 16, 16)
    initialise(generator, torch.Generator().manual_seed(seed))
    return make_players(generator, normed(2, seed=seed), OptimConfig(), lr=2e-4, precision="fp32")


def test_a_checkpoint_brings_the_singular_vectors_back_and_both_steps_agree():
    players = normed_players()
    train_some(players, 3)
    state = snapshot(players)
    other = normed_players(seed=1)
    checkpoints.restore(other, state, 0, 1)
    assert_same(snapshot(other), state)
    train_some(players)
    train_some(other)
    assert_same(snapshot(other), snapshot(players))
    fast, plain = normed_players(), normed_players()
    for players, kind in ((fast, FastStep), (plain, ReferenceStep)):
        random = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (4, 16, 16, 3), generator=random, dtype=torch.uint8)
        step = kind(players, "fp32", channels_last=False, ema_half_life_images=100)
        step(images, torch.randn(4, 4, generator=random), 1000, 4)
    for name, value in fast.discriminator.state_dict().items():
        torch.testing.assert_close(value, plain.discriminator.state_dict()[name], msg=name)


def trains_alike(ranks: Ranks) -> None:
    """Two forwards of a spectrally normalised D before one backward, on every rank the same weights and vectors."""
    torch.manual_seed(ranks.rank)
    players = normed_players()
    for name in ("generator", "discriminator"):
        players.parallel[name] = distributed.wrap(getattr(players, name), ranks, DistributedConfig())
    before = copy.deepcopy(dict(players.discriminator.named_parameters()))
    step = FastStep(players, "fp32", channels_last=True, ema_half_life_images=100)
    torch.manual_seed(ranks.rank + 1)
    for i in range(3):
        step(torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8), torch.randn(2, 4), 1000 + i * 4, 4)
    state = players.discriminator.state_dict()
    shared = {k: v for k, v in state.items() if "running" not in k}
    assert any(k.endswith(".u") for k in shared)
    for theirs in distributed.gather(shared):
        assert_same(theirs, shared)
    assert all(not torch.equal(p, before[n]) for n, p in players.discriminator.named_parameters())


def test_ranks_keep_equal_weights_and_singular_vectors():
    run_ranks(trains_alike, 2)
