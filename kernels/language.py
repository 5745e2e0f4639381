"""Triton's language, where it is installed: torch's wheels for CUDA bring it, those for the CPU alone do not.

Files of kernels take `jit`, `tl` and `cdiv` from here, so that they can be imported, and their CPU path used, on any
machine.  With TRITON_INTERPRET=1 in the environment Triton runs its kernels as Python on the CPU, which is how they are
tested where no GPU is: INTERPRETED then sends CPU tensors to the Triton kernels too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

tl: Any
jit: Callable[[Any], Any]
try:
    import triton
    import triton.language

    tl, jit = triton.language, triton.jit
    AVAILABLE = True
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class _Missing:
        """Stands where a compiled kernel would; nothing reaches it without a CUDA device."""

        def __init__(self, function: Any) -> None:
            self.__name__ = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise ModuleNotFoundError(f"{self.__name__} is a kernel for GPUs: it needs the package triton")

    tl, jit = None, _Missing
    AVAILABLE = False

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"

SM_PROGRAMS = 4 * 132
"""Programs that fill an H100 or H200 (132 SMs).  A constant, so that reductions have one order on every device."""

FOUR_WARPS = {"num_warps": 4, "enable_fp_fusion": True}
"""How kernels are compiled; products and sums are fused whatever a version of Triton does by default."""

TRITON_DTYPES: dict[torch.dtype, Any] = (
    {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }
    if AVAILABLE
    else {}
)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n; what a block of Triton's has to be."""
    return 1 << max(n - 1, 0).bit_length()


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: float64 for float64, which gradcheck wants, and float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
