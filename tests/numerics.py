"""Where kernels run in tests, and how close to float64 a result has to be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.language import INTERPRETED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""The CPU's own path, or, with TRITON_INTERPRET=1, Triton's kernels run by its interpreter; and a GPU."""

FLOATS = [torch.float32, torch.bfloat16, *([] if INTERPRETED else [torch.float16])]
"""Under the interpreter, which is slow, one short type stands for both."""


def assert_rounded(result: Tensor, exact: Tensor, *, sums: Tensor | float = 0.0) -> None:
    """result is the float64 `exact` up to the rounding of its type and of float32 on the way.

    One step of the type covers a result that is cut off, as Triton's interpreter does, in place of rounded.

    Args:
        sums: what was added up to get there, where that is larger than the result.
    """
    assert result.shape == exact.shape, (result.shape, exact.shape)
    result, exact = result.detach(), exact.detach()
    largest = max(float(exact.abs().max()), float(torch.as_tensor(sums).abs().max()))
    absolute = 16 * torch.finfo(torch.float32).eps * largest + 2 * torch.finfo(result.dtype).smallest_normal
    relative = max(torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(result.double().cpu(), exact.double().cpu(), rtol=relative, atol=absolute)


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """An element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def load_native(dtype: torch.dtype = torch.bfloat16) -> None:
    """The C kernels ready, or the test skipped with the reason why they cannot be."""
    try:
        native.load(dtype=dtype)
    except native.NativeError as error:
        pytest.skip(f"no C kernels here: {error}")
