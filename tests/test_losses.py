"""The four losses against the papers' equations, said again in float64 with torch's own functions where it has one."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.losses import Losses

REAL = torch.tensor([-30.0, -2.5, -0.4, 0.0, 0.3, 0.9, 1.7, 30.0])
FAKE = torch.tensor([30.0, 1.1, 0.8, 0.2, 0.0, -0.6, -3.0, -30.0])
EPSILON = 2.0**-23
"""Of float32."""


def bce(outputs: torch.Tensor, label: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs, torch.full_like(outputs, label))


def half_mse(outputs: torch.Tensor, label: float) -> torch.Tensor:
    return F.mse_loss(outputs, torch.full_like(outputs, label)) / 2


def hinge(outputs: torch.Tensor, sign: int) -> torch.Tensor:
    # Of an output x with the target t in {-1, 1}: mean of max(0, 1 - t x).
    return F.margin_ranking_loss(outputs, torch.zeros_like(outputs), torch.full_like(outputs, sign), margin=1.0)


EXPECTED = {
    ("bce", 1.0): (lambda x: bce(x, 1), lambda x: bce(x, 0), lambda x: bce(x, 1)),
    ("bce", 0.9): (lambda x: bce(x, 0.9), lambda x: bce(x, 0), lambda x: bce(x, 1)),
    ("hinge", 1.0): (lambda x: hinge(x, 1), lambda x: hinge(x, -1), lambda x: -x.mean()),
    ("least_squares", 1.0): (lambda x: half_mse(x, 1), lambda x: half_mse(x, 0), lambda x: half_mse(x, 1)),
    ("least_squares", 0.8): (lambda x: half_mse(x, 0.8), lambda x: half_mse(x, 0), lambda x: half_mse(x, 1)),
    ("wasserstein", 1.0): (lambda x: -x.mean(), lambda x: x.mean(), lambda x: -x.mean()),
}
KINDS = list(EXPECTED)


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_values_and_slopes_are_the_papers(kind, label):
    losses = Losses(kind, label)
    for ours, theirs in zip((losses.real, losses.fake, losses.generator), EXPECTED[kind, label], strict=True):
        for outputs in (REAL, FAKE):
            x, exact = outputs.clone().requires_grad_(), outputs.double().requires_grad_()
            loss, expected = ours(x), theirs(exact)
            assert loss.dtype == torch.float32
            assert loss.shape == ()
            assert loss.item() == pytest.approx(expected.item(), rel=8 * EPSILON, abs=8 * EPSILON)
            loss.backward()
            expected.backward()
            assert torch.allclose(x.grad.double(), exact.grad, rtol=8 * EPSILON, atol=8 * EPSILON)
    assert losses.discriminator(REAL, FAKE) == losses.real(REAL) + losses.fake(FAKE)


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_low_precision_outputs_are_summed_in_float32(kind, label):
    losses = Losses(kind, label)
    # A sum of 4,000 in bf16 would stop growing at 256 times its terms.
    many = torch.full((4000,), 0.75, dtype=torch.bfloat16)
    for ours, theirs in zip((losses.real, losses.fake, losses.generator), EXPECTED[kind, label], strict=True):
        assert ours(many).dtype == torch.float32
        assert ours(many).item() == pytest.approx(theirs(many.double()).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_the_least_that_d_can_pay_is_the_least_over_all_outputs(kind, label):
    losses = Losses(kind, label)
    everywhere = torch.linspace(-20, 20, 4001).split(1)
    found = min(losses.real(x).item() for x in everywhere) + min(losses.fake(x).item() for x in everywhere)
    if kind == "wasserstein":
        assert losses.least_d == -math.inf
        assert found == -40
    else:
        assert losses.least_d == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_a_verdict_is_between_0_and_1_and_grows_with_ds_output(kind, label):
    losses = Losses(kind, label)
    outputs = torch.linspace(-200, 200, 401).bfloat16()
    verdicts = losses.verdict(outputs)
    assert verdicts.dtype == torch.float32
    assert verdicts.min() == 0
    assert verdicts.max() == 1
    assert (verdicts.diff() >= 0).all()
    boundary = 0.5 if kind == "least_squares" else 0.0
    assert losses.verdict(torch.tensor([boundary])) == 0.5
