"""Which arithmetic the convolutions use, and whether the hardware has it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

from kernels import native
from pipeline.config import ConfigError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bf16_instructions() -> str:
    """What this processor multiplies bf16 matrices with, faster than float32: "AMX", "AVX512_BF16" or ""."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def cpu_has_fast_bf16() -> bool:
    """Whether oneDNN will compute in bf16 by instructions made for it: they are there, and no variable forbids them.

    With AVX512_BF16 alone a step takes 0.64 of float32's time (AMD EPYC of family 25, ngf 32, batch 32, 2026-11).
    """
    allowed = native.amx_allowed()
    if torch.cpu._is_avx512_bf16_supported():
        return allowed or native.isa_limit() in _WITH_BF16
    return allowed and torch.cpu._is_amx_tile_supported()


def resolve(wanted: str, device: torch.device) -> Precision:
    """`auto` as what this hardware does best; anything else as it is.

    Raises:
        ConfigError: the device cannot do what was asked for.
    """
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        if wanted == "auto":
            return "bf16" if ampere else "fp16"
        if wanted in ("tf32", "bf16") and not ampere:
            raise ConfigError(f"precision must be fp16 or fp32 on a GPU before compute capability 8.0, got {wanted!r}")
    elif wanted == "auto":
        return "bf16" if cpu_has_fast_bf16() else "fp32"
    elif wanted == "tf32":
        raise ConfigError(f"precision must be fp32, bf16 or fp16 on a CPU, got {wanted!r}")
    return wanted  # type: ignore[return-value]


def apply(precision: Precision, *, deterministic: bool) -> None:
    """Set the process-wide switches that belong to a precision."""
    # cuDNN's convolutions use TF32 by default, which is not what somebody who asks for fp32 means.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def dtype_of(precision: Precision) -> torch.dtype:
    """The type of images and activations."""
    return _DTYPES[precision]


def autocast(precision: Precision, device: torch.device, *, cache: bool = True) -> AbstractContextManager:
    """The context in which the networks run: weights stay float32, convolutions are done in `precision`.

    Args:
        cache: convert a weight once for all its uses within the context.
    """
    return torch.autocast(device.type, dtype_of(precision), enabled=precision in ("bf16", "fp16"), cache_enabled=cache)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, which a run may have switched on: its 10-bit mantissas would make a run's precision part of its FID."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
