"""How fast this machine multiplies and copies, and what share of that a piece of work reaches.

The roofline (Williams, Waterman, Patterson 2009): work of so many FLOPs that must move so many bytes takes at least
max(FLOPs / GEMM rate, bytes / copy bandwidth) seconds.  Both rates are measured here, in the same run as the work, not
read from a data sheet: a clock that is lower today lowers the bound as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from pipeline import precision as precision_
from pipeline.precision import Precision

GEMM_SIDES = (1024, 2048, 4096, 8192)
"""Square products that are tried; the best rate counts."""
_LONGEST_S = 0.25
"""A product that takes longer than this is the largest that is tried."""
_MEASURED_S = 0.3
"""Of each product."""
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Larger than any cache."""
_COPIES = 9
_QUEUED = 8
"""Calls behind one spin: a device's queue takes about a thousand launches before the host has to wait."""
_SPIN_HZ = 2_000_000_000
"""Cycles a second of the spinning kernel, at least: a GPU with a lower clock spins longer, which does no harm."""


@dataclass(frozen=True)
class Machine:
    """What the machine reached when nothing else was asked of it."""

    gemm_flops_per_s: float
    copy_bytes_per_s: float
    """Bytes read and written together."""

    def bound_s(self, flops: float, num_bytes: float) -> float:
        """The least seconds that work of so many operations and bytes can take."""
        return max(flops / self.gemm_flops_per_s, num_bytes / self.copy_bytes_per_s)

    def limited_by(self, flops: float, num_bytes: float) -> str:
        """Which of the two makes that bound: `arithmetic` or `memory`."""
        more = flops / self.gemm_flops_per_s > num_bytes / self.copy_bytes_per_s
        return "arithmetic" if more else "memory"


def gemm_rate(precision: Precision, device: torch.device) -> float:
    """Floating-point operations a second of the best square matrix product, two a multiply-add.

    Sets the process-wide switches of that precision, as a step does.
    """
    precision_.apply(precision, deterministic=False)
    dtype = precision_.dtype_of(precision)
    best = 0.0
    for side in GEMM_SIDES:
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(one)

        def multiply(one: torch.Tensor = one, other: torch.Tensor = other, out: torch.Tensor = out) -> None:
            torch.mm(one, other, out=out)

        first = min(call_s(multiply, 1, device) for _ in range(2))  # the first call of a shape sets it up
        calls = max(1, math.ceil(_MEASURED_S / 3 / first))
        fastest = min(first, *(call_s(multiply, calls, device) for _ in range(3)))
        best = max(best, 2 * side**3 / fastest)
        if first > _LONGEST_S:
            break
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy within the device's memory."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # its pages are there
    fastest = min(call_s(lambda: target.copy_(source), 1, device) for _ in range(_COPIES))
    return 2 * source.numel() / fastest


def measure(precision: Precision, device: torch.device) -> Machine:
    """Both rates, in about two seconds."""
    return Machine(gemm_rate(precision, device), copy_bandwidth(device))


def call_s(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one call, the mean of so many.

    On a GPU it is the device's time: a kernel that only spins holds the device until the host has queued all calls, so
    that what lies between two events is work without gaps.  How long the host takes is host_s.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    queued_s = time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found_ms = 0.0
    for done in range(0, calls, _QUEUED):
        count = min(_QUEUED, calls - done)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(2 * count * queued_s * _SPIN_HZ))
        begin.record()
        for _ in range(count):
            function()
        end.record()
        torch.cuda.synchronize(device)
        found_ms += begin.elapsed_time(end)
    return found_ms / 1e3 / calls


def host_s(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds that the host takes to ask for one call, whatever the device does with it; the mean of so many."""
    harness.wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    found = (time.perf_counter() - start) / calls
    harness.wait_for(device)
    return found


def counted_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a call's products and convolutions, as torch counts them; others count nothing."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
