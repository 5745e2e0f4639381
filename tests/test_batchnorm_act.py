"""Under TRITON_INTERPRET=1 (tests/test_triton.py sets it) the same checks are of Triton's kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.batchnorm_act import (
    _batchnorm_act,
    _batchnorm_act_backward,
    _statistics,
    batchnorm_act,
    batchnorm_act_reference,
)
from kernels.language import INTERPRETED
from tests.numerics import DEVICES, FLOATS, assert_rounded, fresh_memory_is_nan

CASES = [  # N, C, H, W, groups, slope
    (4, 5, 3, 7, 2, 0.2),
    (2, 70, 2, 1, 1, 0.0),
    (6, 3, 8, 9, 3, 0.2),
    (2, 1, 1, 1, 1, 0.0),
    (2, 16, 16, 16, 1, 0.2),
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with fresh_memory_is_nan():
        yield


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + offset
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return values.to(device, dtype, memory_format=layout)


def running(channels: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    values = [torch.rand(channels, generator=random).to(device, dtype) for _ in range(2)]
    return [*values, torch.tensor(7, device=device)]


def run(function: Any, case: tuple, dtype: torch.dtype, parameters: torch.dtype, device: str, offset: float = 0.0):
    """Output, gradients of x, weight and bias, and the running statistics; values of `dtype`, arithmetic of the device.

    The reference gets float64 copies of the same rounded values.
    """
    n, c, h, w, groups, slope = case
    exact = function is batchnorm_act_reference
    given = [draw((n, c, h, w), dtype, device, offset), draw((c,), parameters, device), draw((c,), parameters, device)]
    upstream = draw((n, c, h, w), dtype, device).flip(0)
    if exact:
        given, upstream = [each.double() for each in given], upstream.double()
    given = [each.requires_grad_() for each in given]
    state = running(c, device, torch.float64 if exact else torch.float32)
    y = function(*given, *state, slope=slope, num_groups=groups)
    return y, torch.autograd.grad(y, given, upstream), state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_running_statistics_are_those_of_float64(case: tuple, dtype: torch.dtype, device: str):
    y, gradients, state = run(batchnorm_act, case, dtype, torch.float32, device)
    exact_y, exact_gradients, exact_state = run(batchnorm_act_reference, case, dtype, torch.float32, device)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(y, exact_y)
    # What dx is the difference of is as large as weight / standard deviation times dy.
    if case[:4] != (2, 1, 1, 1):  # of two values a channel dx is nothing but what rounding leaves
        assert_rounded(gradients[0], exact_gradients[0], sums=4.0)
    for mine, exact in zip(gradients[1:], exact_gradients[1:], strict=True):
        assert mine.dtype == torch.float32
        assert_rounded(mine, exact, sums=8.0)
    for mine, exact in zip(state[:2], exact_state[:2], strict=True):
        assert_rounded(mine, exact)
    assert state[2] == exact_state[2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_mean_far_from_zero_costs_the_variance_no_digits(device: str):
    case = (4, 5, 8, 9, 2, 0.2)
    y, _, state = run(batchnorm_act, case, torch.float32, torch.float32, device, offset=1000.0)
    exact_y, _, exact_state = run(batchnorm_act_reference, case, torch.float32, torch.float32, device, offset=1000.0)
    assert_rounded(y, exact_y, sums=1000.0)
    assert_rounded(state[1], exact_state[1])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_slopes_of_the_function(device: str):
    x = draw((4, 3, 2, 2), torch.float64, device).requires_grad_()
    weight, bias = (draw((3,), torch.float64, device).requires_grad_() for _ in range(2))
    state = running(3, device, torch.float64)

    def function(*given: Tensor) -> Tensor:
        return batchnorm_act(*given, *state, slope=0.2, num_groups=2)

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_in_another_order_comes_out_right(device: str):
    x = draw((4, 6, 3, 5), torch.float32, device)
    weight, bias = draw((6,), torch.float32, device), draw((6,), torch.float32, device)
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        given = x.contiguous(memory_format=layout).requires_grad_()
        y = batchnorm_act(given, weight, bias, *running(6, device), slope=0.0)
        results.append((y, *torch.autograd.grad(y, given, x.flip(1))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_that_need_no_gradient_get_none_and_x_the_same(device: str):
    x = draw((4, 5, 3, 3), torch.float32, device).requires_grad_()
    weight, bias = draw((5,), torch.float32, device), draw((5,), torch.float32, device)
    found = []
    for needs in (True, False):
        for parameter in (weight, bias):
            parameter.requires_grad_(needs)
            parameter.grad = None
        batchnorm_act(x, weight, bias, *running(5, device), slope=0.2).square().sum().backward()
        found.append(x.grad.clone())
        x.grad = None
    assert weight.grad is None
    assert torch.equal(*found)


def test_a_second_derivative_is_refused_and_not_wrong():
    x = draw((4, 3, 2, 2), torch.float32, "cpu").requires_grad_()
    weight, bias = draw((3,), torch.float32, "cpu"), draw((3,), torch.float32, "cpu")
    y = batchnorm_act(x, weight, bias, *running(3, "cpu"), slope=0.2)
    (slopes,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batchnorm_act_backward"):
        slopes.square().sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="of the registration, not of the kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_registered_as_torch_expects(device: str):
    x = draw((4, 6, 3, 5), torch.float32, device)
    weight, bias = draw((6,), torch.float32, device).requires_grad_(), draw((6,), torch.float32, device)
    mean, var = draw((2, 6), torch.float32, device), draw((2, 6), torch.float32, device).abs()
    torch.library.opcheck(_statistics, (x, *running(6, device), 2, 0.1))
    torch.library.opcheck(_batchnorm_act, (x.clone().requires_grad_(), weight, bias, mean, var, 0.2, 1e-5))
    torch.library.opcheck(_batchnorm_act_backward, (x, x, weight.detach(), bias, mean, var, 0.2, 1e-5))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_again_and_float64s_values_at_the_networks_own_shapes():
    for case in ((256, 512, 4, 4, 2, 0.2), (128, 64, 32, 32, 1, 0.0)):
        first = run(batchnorm_act, case, torch.bfloat16, torch.float32, "cuda")
        again = run(batchnorm_act, case, torch.bfloat16, torch.float32, "cuda")
        exact = run(batchnorm_act_reference, case, torch.bfloat16, torch.float32, "cuda")
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
        assert_rounded(first[0], exact[0])
        assert_rounded(first[1][0], exact[1][0], sums=4.0)
