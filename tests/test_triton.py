"""The Triton kernels on a machine without a GPU: their tests under Triton's interpreter, and through its compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import adam_ema, batchnorm_act, gather, image_ends, language
from tests.compiled import compiling

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("batchnorm_act", "adam_ema", "gather", "image_ends")]

pytestmark = pytest.mark.skipif(not language.AVAILABLE, reason="torch's wheel for the CPU comes without triton")


def test_kernels_pass_their_tests_under_tritons_interpreter():
    """In a process of its own: Triton decides when a kernel is defined whether to interpret it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", *TESTS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def images(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [1, 2])
def test_batchnorm_act_compiles_for_hopper(groups: int, tmp_path: Path):
    x, parameter = images(4, 64, 8, 8), torch.empty(64)
    with compiling(batchnorm_act, str(tmp_path)) as built:
        running = parameter, parameter, torch.tensor(0)
        moments = batchnorm_act._statistics_triton(x, *running, groups, 0.1)
        batchnorm_act._forward_triton(x, parameter, parameter, *moments, 0.2, 1e-5)
        batchnorm_act._backward_triton(x, x, parameter, parameter, *moments, 0.2, 1e-5)
    assert built == ["_slice_moments", "_merge_moments", "_forward", "_slice_sums", "_merge_sums", "_backward"]


def test_adam_ema_compiles_for_hopper(tmp_path: Path):
    tensors, scalar = [torch.empty(n, 3) for n in (64, 1, 5)], torch.zeros(())
    walked = tensors, tensors, tensors, tensors, [scalar] * 3
    copies = [t.bfloat16() for t in tensors]
    with compiling(adam_ema, str(tmp_path)) as built:
        adam_ema._adam_ema_triton(*walked, tensors, copies, scalar, scalar, scalar, scalar, 0.5, 0.999, 1e-8, True)
        adam_ema._adam_ema_triton(*walked, [], [], scalar, scalar, None, None, 0.5, 0.999, 1e-8, False)
    assert built == ["_find_non_finite", "_advance", "_update", "_advance", "_update"]


def test_gather_compiles_for_hopper(tmp_path: Path):
    pixels, rows = torch.empty(9, 66, 66, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with compiling(gather, str(tmp_path)) as built:
        gather._gather_triton(pixels, rows, rows.bool(), rows, rows, 64, 64, torch.bfloat16)
        gather._gather_triton(pixels, rows, None, None, None, 66, 66, torch.float32)
    assert built == ["_gather_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_image_ends_compile_for_hopper(dtype: torch.dtype, tmp_path: Path):
    p, f = images(2, 3, 64, 64, dtype=dtype), images(2, 64, 32, 32, dtype=dtype)
    weight = images(64, 3, 4, 4, dtype=torch.float32)
    with compiling(image_ends, str(tmp_path)) as built:
        image_ends._down_triton(p, None, weight, True, 0.2)
        image_ends._down_triton(p, p, weight, False, 0.0)
        image_ends._up_triton(f, None, weight, True, 0.0)
        image_ends._up_triton(f, f, weight, False, 0.2)
        image_ends._weight_triton(p, None, f, f, weight, 0.2)
        image_ends._weight_triton(p, p, f, None, weight, 0.0)
    assert built == [*["_down"] * 2, *["_up"] * 2, *["_weight", "_merge_weight"] * 2]


def test_without_triton_kernels_can_be_imported_and_say_what_they_miss():
    probe = (
        "import sys; sys.modules['triton'] = None\n"
        "from kernels import batchnorm_act\n"
        "try: batchnorm_act._forward[(1,)]()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "_forward is a kernel for GPUs: it needs the package triton", done.stderr
