"""Both penalties against what can be said of them without a second derivative: closed forms and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.losses import Losses
from pipeline.models import Discriminator, initialise
from pipeline.penalties import gradient_penalty, r1
from pipeline.precision import autocast

N, C, WIDTH, SIDE = 4, 1, 3, 16


class Linear(nn.Module):
    """w . x + 3, whose slope is w wherever it is taken."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        return images.flatten(1) @ self.weight + 3


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(N, C, SIDE, SIDE, generator=random, dtype=torch.float64) - 1).to(dtype)


def network(dtype: torch.dtype = torch.float32, spectral_norm: bool = False) -> Discriminator:
    made = Discriminator(WIDTH, C, SIDE, SIDE, spectral_norm=spectral_norm)
    initialise(made, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4)  # slopes of about 1, so that neither penalty is one of huge numbers
    return made.to(dtype)


MIX = torch.tensor([0.0, 0.25, 0.5, 0.9])
PENALTIES = {
    "gradient_penalty": lambda d, real, fake: gradient_penalty(d, real, fake, MIX.to(real.dtype)),
    "r1": lambda d, real, _fake: r1(d, real),
}
both = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


def test_the_slope_of_a_line_is_its_weight():
    weight = torch.randn(C * SIDE * SIDE, generator=torch.Generator().manual_seed(1)) / 10
    length = weight.norm()
    line = Linear(weight.clone())
    value = gradient_penalty(line, images(1), images(2), MIX)
    value.backward()
    assert torch.allclose(value, (length - 1) ** 2)
    assert torch.allclose(line.weight.grad, 2 * (length - 1) * weight / length)
    line.weight.grad = None
    value = r1(line, images(1))
    value.backward()
    assert torch.allclose(value, length**2 / 2)
    assert torch.allclose(line.weight.grad, weight)


def test_the_slope_is_taken_between_each_real_image_and_its_generated_one():
    line = Linear(torch.ones(C * SIDE * SIDE))
    real, fake = images(1), images(2)
    gradient_penalty(line, real, fake, MIX)
    r1(line, real)
    between, at = line.seen
    for i, share in enumerate(MIX.tolist()):
        assert torch.allclose(between[i], share * real[i] + (1 - share) * fake[i])
    assert torch.equal(at, real)


def test_a_line_without_slope_has_a_finite_penalty_and_gradient():
    for penalty, expected in zip(PENALTIES.values(), (1.0, 0.0), strict=True):
        line = Linear(torch.zeros(C * SIDE * SIDE))
        value = penalty(line, images(1), images(2))
        value.backward()
        assert value == expected
        assert line.weight.grad.isfinite().all()


def slopes_by_differences(discriminator: nn.Module, at: Tensor) -> Tensor:
    """(N, C * SIDE * SIDE) float64: how the sum of D's outputs for the batch changes with each pixel."""
    step, base = 1e-6, at.flatten()
    found = torch.empty_like(base)
    with torch.no_grad():
        for i in range(len(base)):
            ends = []
            for sign in (1, -1):
                moved = base.clone()
                moved[i] += sign * step
                ends.append(discriminator(moved.view_as(at)).sum())
            found[i] = (ends[0] - ends[1]) / (2 * step)
    return found.view(len(at), -1)


def test_both_are_of_the_slopes_that_finite_differences_find():
    """By the batch's own statistics, neighbours included."""
    discriminator, real, fake = network(torch.float64), images(1, torch.float64), images(2, torch.float64)
    probe = copy.deepcopy(discriminator)
    share = MIX.double().view(-1, 1, 1, 1)
    lengths = slopes_by_differences(probe, share * real + (1 - share) * fake).norm(dim=1)
    expected = (lengths - 1).square().mean()
    assert gradient_penalty(discriminator, real, fake, MIX.double()).item() == pytest.approx(expected.item(), rel=1e-6)
    expected = slopes_by_differences(probe, real).square().sum(1).mean() / 2
    assert r1(discriminator, real).item() == pytest.approx(expected.item(), rel=1e-6)


@both
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_its_gradient_in_ds_parameters_is_what_finite_differences_find(penalty, spectral_norm):
    discriminator = network(torch.float64, spectral_norm)
    real, fake = images(1, torch.float64), images(2, torch.float64)
    before = {name: b.clone() for name, b in discriminator.named_buffers()}
    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(penalty(discriminator, real, fake), parameters)
    random, step = torch.Generator().manual_seed(5), 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        way = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        way /= way.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, buffer in discriminator.named_buffers():  # the singular vectors count as constants
                    buffer.copy_(before[name])
                parameter.add_(sign * step * way)
            ends.append(penalty(discriminator, real, fake).detach())
            with torch.no_grad():
                parameter.sub_(sign * step * way)
        slope = (ends[0] - ends[1]) / (2 * step)
        # Spectral norm's own derivative leaves out that its vectors, one more iteration on, have turned a little.
        tolerance = (2e-3 if spectral_norm else 1e-5) * gradient.norm().item()
        assert slope.item() == pytest.approx((gradient * way).sum().item(), abs=tolerance)


@both
def test_running_statistics_and_gradients_stay_as_they_are(penalty):
    discriminator = network()
    discriminator(images(0))
    before = copy.deepcopy(discriminator.state_dict())
    for parameter in discriminator.parameters():
        parameter.grad = torch.ones_like(parameter)
    real, fake = images(1).requires_grad_(), images(2).requires_grad_()
    value = penalty(discriminator, real, fake)
    assert all(torch.equal(now, before[name]) for name, now in discriminator.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in discriminator.parameters())
    value.backward()
    assert real.grad is None
    assert fake.grad is None
    discriminator(images(3))
    assert not torch.equal(discriminator.state_dict()["layers.3.running_mean"], before["layers.3.running_mean"])


@both
def test_statistics_are_kept_again_after_an_error(penalty):
    discriminator = network()
    with pytest.raises(RuntimeError):
        penalty(discriminator, images(1)[..., :-3], images(2)[..., :-3])
    assert all(m.track_running_stats for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d))


def test_fp16_takes_the_slope_in_float32_and_bf16_is_no_further_off_than_it_is_for_the_loss():
    random, side, found = torch.Generator().manual_seed(0), 32, {}
    coarse = (torch.randn(8, 3, 4, 4, generator=random) for _ in range(2))  # neighbouring pixels alike, as in pictures
    real, fake = (torch.tanh(F.interpolate(each, side, mode="bilinear")) for each in coarse)
    mix = torch.rand(8, generator=random)
    discriminator = Discriminator(16, 3, side, side)
    initialise(discriminator, random)
    for precision in ("fp32", "fp16", "bf16"):
        with autocast(precision, torch.device("cpu")):
            loss = Losses().discriminator(discriminator(real), discriminator(fake))
        values = (
            loss,
            gradient_penalty(discriminator, real, fake, mix, precision),
            r1(discriminator, real, precision),
        )
        assert all(value.dtype == torch.float32 for value in values)
        found[precision] = [
            torch.cat([g.flatten() for g in torch.autograd.grad(value, list(discriminator.parameters()))])
            for value in values
        ]
    of_loss, *of_penalties = (
        float((low - exact).norm() / exact.norm()) for low, exact in zip(found["bf16"], found["fp32"], strict=True)
    )
    assert all(0 < distance < of_loss for distance in of_penalties), (of_loss, of_penalties)
    assert all(torch.equal(*pair) for pair in zip(found["fp16"][1:], found["fp32"][1:], strict=True))
