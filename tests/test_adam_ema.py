"""Under TRITON_INTERPRET=1 (tests/test_triton.py sets it) the same checks are of Triton's kernels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.adam_ema import FusedAdamEma, _adam_ema, adam_ema_reference
from kernels.language import INTERPRETED
from tests.numerics import DEVICES, assert_rounded

SHAPES = [(5, 3, 4, 4), (7,), (1, 6, 4, 4), (1100,), (2, 8, 1, 1)]
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.5, 0.999), "eps": 1e-8}


def draw(shapes: list, device: str, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in found]


def parameters(device: str, shapes: list = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(x) for x in draw(shapes, device, 0)]


def give_gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    gradients = draw([p.shape for p in params], params[0].device.type, seed)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone(memory_format=torch.preserve_format)
    return gradients


def clones(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [0.3, 0.8, 1.0])
def test_three_steps_are_those_of_float64_within_float32s_rounding(weight: float, device: str):
    params = parameters(device)
    averages = draw(SHAPES, device, 1)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    exact = [(p.detach().double(), 0.0, 0.0, a.double()) for p, a in zip(params, averages, strict=True)]
    optimizer = FusedAdamEma(params, **SETTINGS, averages=averages, copies=copies)
    optimizer.ema_weight = weight
    for t in (1, 2, 3):
        gradients = give_gradients(params, 10 + t)
        optimizer.step()
        for i, (g, (p, m, v, a)) in enumerate(zip(gradients, exact, strict=True)):
            exact[i] = adam_ema_reference(p, g.double(), m, v, t, a, **SETTINGS, weight=weight)
    for p, average, low, (exact_p, exact_m, exact_v, exact_a) in zip(params, averages, copies, exact, strict=True):
        state = optimizer.state[p]
        found = (p, exact_p), (state["exp_avg"], exact_m), (state["exp_avg_sq"], exact_v), (average, exact_a)
        for mine, its in found:
            assert_rounded(mine, its)
        assert_rounded(low, p.detach().double())
        assert state["step"] == 3


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torchs_fused_adam_and_lerp_and_more_tensors_than_a_launch_takes(device: str):
    shapes = [(i % 3 + 1, 2) for i in range(19)]
    ours, theirs = parameters(device, shapes), parameters(device, shapes)
    averages, its_averages = clones(ours), clones(theirs)
    optimizer = FusedAdamEma(ours, **SETTINGS, averages=averages)
    other = torch.optim.Adam(theirs, **SETTINGS, fused=True)
    optimizer.ema_weight = torch.tensor(0.25, device=device)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        other.step()
        torch._foreach_lerp_(its_averages, [p.detach() for p in theirs], 0.25)
    for mine, its in zip([*ours, *averages], [*theirs, *its_averages], strict=True):
        assert_rounded(mine, its.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_moves_only_the_average(value: float, device: str):
    params = parameters(device)
    averages = [torch.zeros_like(p) for p in params]
    optimizer = FusedAdamEma(params, **SETTINGS, averages=averages, check_finite=True)
    optimizer.ema_weight = 0.5
    give_gradients(params, 1)
    optimizer.step()
    assert optimizer.left_out == 0
    before = clones(params), [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    give_gradients(params, 2)
    params[3].grad[-1] = value
    optimizer.step()
    assert optimizer.left_out == 1
    for p, kept, state, average in zip(params, *before, averages, strict=True):
        assert torch.equal(p, kept)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
        assert_rounded(average, 0.75 * p.detach().double())
    give_gradients(params, 2)
    optimizer.step()
    assert optimizer.left_out == 0
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_flag_from_outside_leaves_the_step_out(device: str):
    params = parameters(device)
    optimizer = FusedAdamEma(params, **SETTINGS)
    before = clones(params)
    give_gradients(params, 1)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert all(torch.equal(p, kept) for p, kept in zip(params, before, strict=True))
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_scaler_drives_it_as_torchs(device: str):
    ours, theirs = parameters(device), parameters(device)
    optimizers = FusedAdamEma(ours, **SETTINGS), torch.optim.Adam(theirs, **SETTINGS, fused=True)
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        scaler = torch.amp.GradScaler(device, init_scale=8.0)
        scaler.scale(torch.ones((), device=device))
        give_gradients(params, 1)
        scaler.step(optimizer)
        scaler.update()
        params[0].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0
    for mine, its in zip(ours, theirs, strict=True):
        assert_rounded(mine, its.double())
        assert_rounded(mine.grad.nan_to_num(0, 0, 0), its.grad.double().nan_to_num(0, 0, 0))


@pytest.mark.parametrize("fused", [True, False])
def test_checkpoints_go_from_torchs_adam_to_it_and_back(fused: bool):
    ours, theirs = parameters("cpu"), parameters("cpu")
    torchs, own = torch.optim.Adam(theirs, **SETTINGS, fused=fused), FusedAdamEma(ours, **SETTINGS)
    give_gradients(theirs, 1)
    torchs.step()
    with torch.no_grad():
        for mine, its in zip(ours, theirs, strict=True):
            mine.copy_(its)
    own.load_state_dict(copy.deepcopy(torchs.state_dict()))
    give_gradients(ours, 2)
    own.step()
    back = torch.optim.Adam(theirs, **SETTINGS, fused=True)
    back.load_state_dict(copy.deepcopy(torchs.state_dict()))
    give_gradients(theirs, 2)
    back.step()
    for mine, its in zip(ours, theirs, strict=True):
        assert_rounded(mine, its.double())
    assert own.state_dict().keys() == back.state_dict().keys()
    for group, other in zip(own.state_dict()["param_groups"], back.state_dict()["param_groups"], strict=True):
        assert group.keys() == other.keys()
    for state, other in zip(own.state.values(), back.state.values(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    back.load_state_dict(own.state_dict())
    assert back.state[theirs[0]]["step"] == 2


def test_moments_take_the_memory_format_of_their_parameter():
    theirs = [nn.Parameter(torch.randn(4, 3, 2, 2))]
    torchs = torch.optim.Adam(theirs, fused=True)
    give_gradients(theirs, 1)
    theirs[0].grad = theirs[0].grad.contiguous()
    torchs.step()
    ours = [nn.Parameter(theirs[0].detach().to(memory_format=torch.channels_last))]
    own = FusedAdamEma(ours)
    own.load_state_dict(copy.deepcopy(torchs.state_dict()))
    state, its = own.state[ours[0]], torchs.state[theirs[0]]
    assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(state["exp_avg"], its["exp_avg"])
    give_gradients(ours, 2)
    ours[0].grad = ours[0].grad.contiguous()  # in another order than its parameter
    own.step()
    give_gradients(theirs, 2)
    theirs[0].grad = theirs[0].grad.contiguous()
    torchs.step()
    assert_rounded(ours[0], theirs[0].double())


def test_other_kinds_of_adam_are_refused():
    params = parameters("cpu")
    other = torch.optim.Adam(params, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"has no weight_decay, got 0\.1"):
        FusedAdamEma(params).load_state_dict(other.state_dict())


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameter_without_a_gradient_stays_and_its_average_moves(device: str):
    params = parameters(device)
    averages = [torch.zeros_like(p) for p in params]
    optimizer = FusedAdamEma(params, **SETTINGS, averages=averages)
    optimizer.ema_weight = 0.5
    give_gradients(params, 1)
    params[1].grad, before = None, params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert_rounded(averages[1], 0.5 * before.double())


@pytest.mark.skipif(INTERPRETED, reason="of the registration, not of the kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_is_registered_as_torch_expects(device: str):
    def some(seed: int) -> list[Tensor]:
        return [x.abs() for x in draw([(3, 2), (4,)], device, seed)]

    steps = [torch.zeros((), device=device) for _ in range(2)]
    scalars = torch.full((), 0.1, device=device), torch.full((), 0.5, device=device), torch.zeros((), device=device)
    numbers = 0.5, 0.999, 1e-8, True
    torch.library.opcheck(_adam_ema, (some(0), some(1), some(2), some(3), steps, some(4), [], *scalars, None, *numbers))


@pytest.mark.gpu
def test_a_captured_graph_goes_on_counting_and_reads_its_numbers_anew():
    params = parameters("cuda")
    averages = clones(params)
    lr, weight = torch.tensor(0.02, device="cuda"), torch.tensor(0.25, device="cuda")
    settings = SETTINGS | {"lr": lr}
    optimizer = FusedAdamEma(params, **settings, averages=averages, check_finite=True)
    optimizer.ema_weight = weight
    gradients = give_gradients(params, 0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    theirs = parameters("cuda")
    its_averages = clones(theirs)
    other = torch.optim.Adam(theirs, **SETTINGS, fused=True)
    for i in range(4):
        rate, share = (0.02, 0.25) if i == 0 else (0.01 * i, 0.1 * i)
        if i:  # the first step is the one before the capture
            for p, g in zip(params, draw(SHAPES, "cuda", i), strict=True):
                p.grad.copy_(g)
            lr.fill_(rate)
            weight.fill_(share)
            graph.replay()
        for p, g in zip(theirs, gradients if i == 0 else draw(SHAPES, "cuda", i), strict=True):
            p.grad = g.clone(memory_format=torch.preserve_format)
        other.param_groups[0]["lr"] = rate
        other.step()
        torch._foreach_lerp_(its_averages, [p.detach() for p in theirs], share)
    assert optimizer.state[params[0]]["step"] == 4
    for mine, its in zip([*params, *averages], [*theirs, *its_averages], strict=True):
        assert_rounded(mine, its.double())
