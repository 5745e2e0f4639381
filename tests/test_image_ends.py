"""Under TRITON_INTERPRET=1 (tests/test_triton.py sets it) the same checks are of Triton's kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import image_ends
from kernels.image_ends import (
    conv_leaky_relu,
    conv_leaky_relu_reference,
    conv_transpose_tanh,
    conv_transpose_tanh_reference,
)
from kernels.language import INTERPRETED
from tests.numerics import DEVICES, FLOATS, assert_rounded, fresh_memory_is_nan

CASES = [  # N, C, O, h, w
    (2, 3, 8, 3, 5),
    (3, 1, 17, 2, 2),
    (1, 4, 70, 1, 3),
    (2, 3, 16, 9, 8),
]
LAYERS = {
    "D": (lambda x, weight: conv_leaky_relu(x, weight, 0.2), lambda x, w: conv_leaky_relu_reference(x, w, 0.2)),
    "G": (conv_transpose_tanh, conv_transpose_tanh_reference),
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with fresh_memory_is_nan():
        yield


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.to(device, memory_format=torch.channels_last)


def inputs(layer: str, case: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight in float32 but of values that the type has, and a gradient from above."""
    n, c, o, h, w = case
    narrow, wide = (n, c, 2 * h, 2 * w), (n, o, h, w)
    into, out = (narrow, wide) if layer == "D" else (wide, narrow)
    weight = (draw((o, c, 4, 4), torch.float32, device, 1) / 4).to(dtype).float()
    return draw(into, dtype, device, 0), weight, draw(out, dtype, device, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_gradients_are_those_of_float64(layer: str, case: tuple, dtype: torch.dtype, device: str):
    torch.backends.cudnn.allow_tf32 = False
    function, reference = LAYERS[layer]
    x, weight, upstream = inputs(layer, case, dtype, device)
    given = x.requires_grad_(), weight.requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in given]
    y, exact_y = function(*given), reference(*exact)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(y, exact_y, sums=8.0)
    gradients = torch.autograd.grad(y, given, upstream)
    exact_gradients = torch.autograd.grad(exact_y, exact, upstream.double())
    # Every term of these sums was rounded to the type after its activation's derivative, and so was the output that
    # tanh's is made of.
    terms = torch.autograd.grad(reference(*exact), exact, upstream.double().abs())
    share = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 16
    for mine, its, size in zip(gradients, exact_gradients, terms, strict=True):
        assert_rounded(mine, its, sums=8.0 + 8 * share * float(size.abs().max()))
    assert gradients[1].dtype == torch.float32
    assert gradients[1].stride() == weight.stride()


@pytest.mark.skipif(INTERPRETED, reason="its products are of float32")
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_the_slopes_of_the_function(layer: str):
    x, weight, _ = inputs(layer, (2, 3, 4, 2, 2), torch.float64, "cpu")
    given = x.requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(LAYERS[layer][0], given, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", LAYERS)
def test_memory_in_another_order_comes_out_right(layer: str, device: str):
    x, weight, upstream = inputs(layer, CASES[0], torch.float32, device)
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        given = [each.contiguous(memory_format=layout).requires_grad_() for each in (x, weight)]
        y = LAYERS[layer][0](*given)
        found.append((y, *torch.autograd.grad(y, given, upstream.contiguous(memory_format=layout))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_under_autocast_it_works_in_its_type_and_leaves_the_gradient_in_float32(layer: str):
    x, weight, _ = inputs(layer, CASES[0], torch.float32, "cpu")
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = LAYERS[layer][0](x, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", LAYERS)
def test_only_the_gradients_that_are_wanted_are_computed(layer: str, monkeypatch: pytest.MonkeyPatch):
    x, weight, upstream = inputs(layer, CASES[0], torch.float32, "cpu")
    monkeypatch.setattr(image_ends, "_image_end_weight", None)
    x.requires_grad_()
    LAYERS[layer][0](x, weight).backward(upstream)
    assert x.grad is not None


@pytest.mark.parametrize("layer", LAYERS)
def test_a_second_derivative_is_refused_and_not_wrong(layer: str):
    x, weight, _ = inputs(layer, CASES[0], torch.float32, "cpu")
    x.requires_grad_()
    (slopes,) = torch.autograd.grad(LAYERS[layer][0](x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        slopes.square().sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="of the registration, not of the kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_registered_as_torch_expects(device: str):
    p, weight, f = inputs("D", CASES[0], torch.float32, device)
    weight.requires_grad_()
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (image_ends._image_end_down, (p.clone().requires_grad_(), None, weight, True, 0.2)),
        (image_ends._image_end_up, (f.clone().requires_grad_(), None, weight, True, 0.0)),
        (image_ends._image_end_down, (p, p.tanh(), weight.detach(), False, 0.0)),
        (image_ends._image_end_weight, (p, None, f, f, weight.detach(), 0.2)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_a_gpu_gives_the_same_bits_again_and_float64s_values_at_the_networks_own_shapes(layer: str):
    x, weight, upstream = inputs(layer, (128, 3, 64, 32, 32), torch.bfloat16, "cuda")
    given = x.requires_grad_(), weight.requires_grad_()
    runs = []
    for _ in range(2):
        y = LAYERS[layer][0](*given)
        runs.append((y, *torch.autograd.grad(y, given, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert_rounded(runs[0][0], LAYERS[layer][1](x.double(), weight.double()), sums=8.0)
