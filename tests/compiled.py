"""Compiles kernels for a GPU on a machine that has none: Triton brings NVIDIA's assembler along.

The interpreter takes kernels that the compiler refuses (types that change in a loop, blocks that are no power of two).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HOPPER = 90
"""Compute capability 9.0: H100 and H200."""

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int64: "*i64",
}


class _Compiler:
    """Stands in for a kernel: a launch compiles it for what it was given, and runs nothing."""

    def __init__(self, kernel: Any, others: Callable[[], Any], done: list[str]) -> None:
        self.kernel, self.others, self.done = kernel, others, done

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **named: Any) -> None:
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource

            assert len(grid) <= 3, grid
            assert all(n <= 65535 for n in grid[1:]), grid
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            constants = {p.name for p in self.kernel.params if p.is_constexpr}
            signature, constexprs, attrs = {}, {}, {}
            for i, name in enumerate(self.kernel.arg_names):
                if name in constants:
                    signature[name], constexprs[(i,)] = "constexpr", values[name]
                else:
                    signature[name] = _describe(values[name], (i,), constexprs, attrs)
            source = ASTSource(self.kernel, signature, constexprs, attrs)
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            with self.others():  # what the kernel itself calls
                built = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
            assert built.asm["cubin"], self.kernel.__name__
            self.done.append(self.kernel.__name__)

        return launch


def _describe(value: Any, path: tuple[int, ...], constexprs: dict, attrs: dict) -> Any:
    """The type of an argument as a launch on a device would have it."""
    if isinstance(value, tuple):
        return tuple(_describe(each, (*path, i), constexprs, attrs) for i, each in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attrs[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


@contextlib.contextmanager
def compiling(module: ModuleType, cache: str) -> Iterator[list[str]]:
    """Every launch of the module's kernels compiles; yields the names of those that were built.

    Args:
        cache: a folder for what Triton keeps.
    """
    import triton
    from triton.runtime import JITFunction

    done: list[str] = []
    kernels = {k: v for k, v in vars(module).items() if isinstance(v, JITFunction)}
    with contextlib.ExitStack() as stack, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for name, kernel in kernels.items():
            compiler = _Compiler(kernel, lambda: mock.patch.multiple(module, **kernels), done)
            stack.enter_context(mock.patch.object(module, name, compiler))
        yield done
