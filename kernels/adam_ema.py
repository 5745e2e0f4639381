"""Adam, a running average of the parameters and a low-precision copy of them, in one pass over all parameters.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    average = average + weight * (p - average);  copy = p rounded

Kingma and Ba 2015, algorithm 1, as torch.optim.Adam(fused=True) computes it, then torch.lerp.  Bytes a parameter, all
float32: p, g, m, v and the average are read, p, m, v and the average written: 36, and 2 for a bf16 copy.  Adam and lerp
apart: 28 and 12, and the copy 6 more.  The finite check has to see every gradient before the first update: 4 more.

One launch walks up to 16 tensors, whose addresses are arguments of the kernel.  A table of addresses in GPU memory
would have to be filled anew whenever a gradient moves, by a copy from the host within a captured graph; a launch for
each tensor would cost more than the small ones' bytes; flat buffers would take the parameters' memory format away.
Everything that changes from step to step (step counts, learning rate, average's weight, found_inf) is read on the
device, so a captured graph goes on as it should.

Legend: p parameters, g gradients, m and v first and second moments, t steps.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.language import FOUR_WARPS, INTERPRETED, cdiv, jit, tl

_TENSORS = 16
"""At a launch; G and D of 64 x 64 images have 13 and 11."""

_BLOCK = 1024
"""Elements of a program: 8 a thread, so that each tensor is two reads of 16 bytes."""

_CHECK_BLOCK = 4096


def adam_ema_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    average: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, of one tensor at step t = 1, 2, ...: p, m, v and the average afterwards.  Slow and obvious."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p, m, v, average + weight * (p - average)


@jit
def _find_non_finite(grads, numels, found_ptr, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """found becomes 1 where a gradient holds an infinity or a NaN.  All who write write the same: no atomics."""
    first = 0
    for i in tl.static_range(NUM):
        block = tl.program_id(0) - first
        if (block >= 0) & (block * BLOCK < numels[i]):
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(grads[i] + at, at < numels[i], other=0.0).to(tl.float32)
            bad = tl.max(tl.where(tl.abs(g) < float("inf"), 0, 1), 0)
            if bad > 0:
                tl.store(found_ptr, 1.0)
        first += tl.cdiv(numels[i], BLOCK)


@jit
def _advance(steps, lr_ptr, found_ptr, factors_ptr, log_beta1, log_beta2, NUM: tl.constexpr):
    """Count the step, unless it is left out; lr / (1 - beta1^t) and sqrt(1 - beta2^t) of each tensor's t."""
    counted = 1.0
    if found_ptr is not None:
        counted = tl.where(tl.load(found_ptr) > 0, 0.0, 1.0)
    lr = tl.load(lr_ptr).to(tl.float64)
    for i in tl.static_range(NUM):
        t = tl.load(steps[i]) + counted
        tl.store(steps[i], t)
        # In float64, since 1 - beta2^t is 0.001 at first.
        tl.store(factors_ptr + 2 * i, (lr / (1.0 - tl.exp(t.to(tl.float64) * log_beta1))).to(tl.float32))
        tl.store(factors_ptr + 2 * i + 1, tl.sqrt(1.0 - tl.exp(t.to(tl.float64) * log_beta2)).to(tl.float32))


@jit
def _update(
    params, grads, exp_avgs, exp_avg_sqs, averages, copies, numels, factors_ptr, weight_ptr, found_ptr, scale_ptr,
    beta1, rest1, beta2, rest2, eps, NUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = 0
    for i in tl.static_range(NUM):
        block = tl.program_id(0) - first
        if (block >= 0) & (block * BLOCK < numels[i]):
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < numels[i]
            wanted = inside
            if found_ptr is not None:
                wanted = at < tl.where(tl.load(found_ptr) > 0, 0, numels[i])
            p = tl.load(params[i] + at, inside)
            g = tl.load(grads[i] + at, inside).to(tl.float32)
            if scale_ptr is not None:
                g = g / tl.load(scale_ptr)
                tl.store(grads[i] + at, g.to(grads[i].dtype.element_ty), wanted)
            m = beta1 * tl.load(exp_avgs[i] + at, inside) + rest1 * g
            v = beta2 * tl.load(exp_avg_sqs[i] + at, inside) + rest2 * g * g
            step_size = tl.load(factors_ptr + 2 * i)
            root = tl.load(factors_ptr + 2 * i + 1)
            new = p - step_size * m / (tl.sqrt(v) / root + eps)
            if found_ptr is not None:
                new = tl.where(wanted, new, p)
            tl.store(exp_avgs[i] + at, m, wanted)
            tl.store(exp_avg_sqs[i] + at, v, wanted)
            tl.store(params[i] + at, new, wanted)
            if averages is not None:
                weight = tl.load(weight_ptr)
                average = tl.load(averages[i] + at, inside)
                # As torch.lerp: exact at both ends.
                near = average + weight * (new - average)
                far = new - (new - average) * (1.0 - weight)
                tl.store(averages[i] + at, tl.where(weight < 0.5, near, far), inside)
            if copies is not None:
                tl.store(copies[i] + at, new.to(copies[i].dtype.element_ty), inside)
        first += tl.cdiv(numels[i], BLOCK)


def _adam_ema_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    weight: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    check_finite: bool,
) -> None:
    chunks = [slice(i, i + _TENSORS) for i in range(0, len(params), _TENSORS)]
    if check_finite:
        for chunk in chunks:
            numels = tuple(p.numel() for p in params[chunk])
            grid = (sum(cdiv(n, _CHECK_BLOCK) for n in numels),)
            _find_non_finite[grid](
                tuple(grads[chunk]), numels, found_inf, NUM=len(numels), BLOCK=_CHECK_BLOCK, **FOUR_WARPS
            )
    factors = torch.empty(len(params), 2, dtype=torch.float32, device=lr.device)
    logs = tuple(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    for chunk in chunks:
        numels = tuple(p.numel() for p in params[chunk])
        num, mine = len(numels), factors[chunk]
        _advance[(1,)](tuple(steps[chunk]), lr, found_inf, mine, *logs, NUM=num, **FOUR_WARPS)
        tensors = (tuple(each[chunk]) for each in (params, grads, exp_avgs, exp_avg_sqs))
        beside = (tuple(each[chunk]) if each else None for each in (averages, copies))
        on_device = (mine, weight, found_inf, grad_scale)
        grid = (sum(cdiv(n, _BLOCK) for n in numels),)
        betas = (beta1, 1 - beta1, beta2, 1 - beta2)
        _update[grid](*tensors, *beside, numels, *on_device, *betas, eps, NUM=num, BLOCK=_BLOCK, **FOUR_WARPS)


@torch.library.custom_op(
    "dcgan::adam_ema",
    mutates_args=("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "averages", "copies", "found_inf"),
    device_types="cpu",
)
def _adam_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: Tensor,
    weight: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    check_finite: bool,
) -> None:
    if INTERPRETED:
        tensors = (params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies)
        _adam_ema_triton(*tensors, lr, weight, found_inf, grad_scale, beta1, beta2, eps, check_finite)
        return
    every, counts = list(params), list(steps)
    if check_finite:
        assert found_inf is not None
        torch._amp_foreach_non_finite_check_and_unscale_(list(grads), found_inf, torch.ones(()))
    torch._foreach_add_(counts, 1)
    torch._fused_adam_(
        every,
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        counts,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(counts, [found_inf.sign()] * len(counts))
    if averages:
        torch._foreach_lerp_(list(averages), every, float(weight))
    if copies:
        torch._foreach_copy_(list(copies), every)


_adam_ema.register_kernel("cuda")(_adam_ema_triton)
_adam_ema.register_fake(lambda *_: None)


class FusedAdamEma(torch.optim.Adam):
    """torch.optim.Adam(fused=True) that moves an average of the parameters, and copies of them, in the same pass.

    Its state_dict is Adam's, so checkpoints go from one to the other.  No weight decay, amsgrad or maximize.  Where
    `found_inf` is above 0 parameters, moments and step counts stay; the average still moves towards the parameters.
    Nothing in a step waits for the device, and a captured graph may be replayed: for that `lr` and `ema_weight` are
    tensors, to be filled between replays.
    """

    ema_weight: float | Tensor = 0.0
    """Share of the new parameters in the average, 0 to 1; a tensor () float32 on their device, or a number."""

    found_inf: Tensor | None
    grad_scale: Tensor | None
    """() float32 on the device, as torch.amp.GradScaler sets and deletes them: leave the step out; divide gradients."""

    left_out: Tensor | None = None
    """() float32: above 0 where the last step was left out; None where nothing could have left it out."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        averages: Sequence[Tensor] = (),
        copies: Sequence[Tensor] = (),
        check_finite: bool = False,
    ) -> None:
        """
        Args:
            averages, copies: one for each parameter in order, of its shape, or none at all; float32, and any float.
            check_finite: look at the gradients, and leave the step out where one is not finite; a `found_inf` that was
                given is then set to 1.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.check_finite = check_finite
        every = [p for group in self.param_groups for p in group["params"]]
        for beside in (averages, copies):
            assert len(beside) in (0, len(every)), (len(beside), len(every))
            assert all(_same_order(each, p) for each, p in zip(beside, every, strict=False)), "another memory format"
        assert all(p.dtype == torch.float32 for p in every), {p.dtype for p in every}
        self._averages = dict(zip(every, averages, strict=False))
        self._copies = dict(zip(every, copies, strict=False))
        self._numbers: dict[str, tuple[float, Tensor]] = {}

    @property
    def has_averages(self) -> bool:
        """Whether it was given any to move."""
        return bool(self._averages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adam's state, fused or not.

        Raises:
            ValueError: it is of an Adam with weight decay, amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            _refuse_other_kinds(group)
        groups = [{**group, "fused": True, "foreach": False} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = _ordered_as(state[key], parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.left_out = getattr(self, "found_inf", None)
        if self.check_finite and self.left_out is None:
            self.left_out = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        for number, group in enumerate(self.param_groups):
            _refuse_other_kinds(group)
            every = group["params"]
            params = [p for p in every if p.grad is not None]
            weight = self._on_device("weight", self.ema_weight, every[0].device)
            if params:
                states = [self._state_of(p) for p in params]
                _adam_ema(
                    params,
                    [_ordered_as(p.grad, p) for p in params],
                    *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")),
                    *([each[p] for p in params] if each else [] for each in (self._averages, self._copies)),
                    self._on_device(f"lr {number}", group["lr"], every[0].device, torch.float64),  # as torch takes it
                    weight,
                    self.left_out,
                    getattr(self, "grad_scale", None),
                    *group["betas"],
                    group["eps"],
                    self.check_finite,
                )
            for p in every:
                if p.grad is None and p in self._averages:
                    self._averages[p].lerp_(p, weight)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _on_device(
        self, name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A number as a tensor that is filled only when the number changes."""
        if isinstance(value, Tensor):
            return value
        if name not in self._numbers:
            self._numbers[name] = math.nan, torch.empty((), dtype=dtype, device=device)
        before, tensor = self._numbers[name]
        if value != before:
            self._numbers[name] = value, tensor.fill_(value)
        return tensor


def _refuse_other_kinds(group: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the group asks for what FusedAdamEma does not compute.
    """
    for key in ("weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"):
        if group.get(key):
            raise ValueError(f"FusedAdamEma has no {key}, got {group[key]}")


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether equal places in memory are equal elements; strides of sides of length 1 mean nothing."""
    sides = zip(one.stride(), other.stride(), other.shape, strict=True)
    return one.shape == other.shape and all(a == b or side == 1 for a, b, side in sides)


def _ordered_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor in its parameter's memory format: itself where it has it, as kernels walk all as flat memory."""
    if _same_order(tensor, parameter):
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
