import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ConfigError, num_halvings
from pipeline.models import Discriminator, Generator, GroupedBatchNorm2d, forward_flops, initialise, step_flops


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
