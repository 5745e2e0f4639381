"""Packages: are they there, new enough, and do they work together."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.doctor import ROOT, TROUBLE, Check, failed, first_line, look, ok, warning

INSTALL = "make train sets up .venv; by hand: pip install -e ."
_OTHERS = {
    "jsonargparse": ("jsonargparse", "the command line"),
    "docstring-parser": ("docstring_parser", "--help"),
    "pyyaml": ("yaml", "the configs"),
    "tensorboard": ("torch.utils.tensorboard", "the curves"),
    "pillow": ("PIL.Image", "pictures"),
    "numpy": ("numpy", "the images' way to torch"),
    "tqdm": ("tqdm", "the progress bar"),
}
"""Package: the module that the trainer imports of it, and what for."""


def checks() -> list[Check]:
    """All of them, torch first: the others build on it."""
    found = look("python", python)
    found += look("torch", torch_itself)
    found += look("torchvision", torchvision)
    found += look("dali", dali)
    for package in _OTHERS:
        found += look(package, other, package)
    return found + look("native kernels", native_kernels) + look("triton", triton) + look("apex", apex)


def minima(setup: Path = ROOT / "setup.py") -> dict[str, str]:
    """Least version of each package, and of "python", as setup.py says."""
    text = setup.read_text()
    python_requires = re.search(r'python_requires=">=([\d.]+)"', text)
    assert python_requires, f"{setup} names no Python version"
    return {"python": python_requires[1], **dict(re.findall(r'"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)', text))}


def numbers(version: str) -> tuple[int, ...]:
    """2.15.0+cu132 as (2, 15, 0); what comes after the numbers does not count."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def python(found: str = platform.python_version()) -> list[Check]:
    least = minima()["python"]
    if numbers(found) < numbers(least):
        return [failed("python", f"{found}, {least} or newer is needed", f"install Python {least} and {INSTALL}")]
    program = Path(sys.executable)
    return [ok("python", f"{found}, {program.relative_to(ROOT) if program.is_relative_to(ROOT) else program}")]


def _imported(package: str, module: str, why: str = "") -> tuple[Any, str] | Check:
    """The module and its version, or what is wrong with it."""
    try:
        loaded = importlib.import_module(module)
    except TROUBLE as error:
        needed = f"; needed for {why}" if why else ""
        return failed(package, f"cannot be imported: {first_line(error)}{needed}", INSTALL)
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = str(getattr(loaded, "__version__", "unknown"))
    least = minima().get(package, "0")
    if numbers(found) < numbers(least):
        return failed(package, f"{found}, {least} or newer is needed", f"pip install -U '{package}>={least}'")
    return loaded, found


def torch_itself() -> list[Check]:
    imported = _imported("torch", "torch")
    if isinstance(imported, Check):
        return [imported]
    torch, found = imported
    if torch.version.cuda is None:
        return [ok("torch", f"{found}, built without CUDA")]
    checks = [ok("torch", f"{found}, built for CUDA {torch.version.cuda}")]
    if not torch.distributed.is_nccl_available():
        return [*checks, warning("nccl", "not in this torch: several GPUs cannot train together", INSTALL)]
    return [*checks, ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))]


def torchvision() -> list[Check]:
    """It loads operators into torch, which only works for the torch that it was built with."""
    import torch

    pair = "both from one index: pip install -U torch torchvision"
    imported = _imported("torchvision", "torchvision")
    if isinstance(imported, Check):
        return [failed("torchvision", imported.found, pair)]
    vision, found = imported
    try:
        vision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except TROUBLE as error:
        return [failed("torchvision", f"{found} does not fit torch {torch.__version__}: {first_line(error)}", pair)]
    return [ok("torchvision", found)]


def other(package: str) -> list[Check]:
    module, why = _OTHERS[package]
    if module.startswith("torch."):
        import torch  # noqa: F401 - where it is missing, it is not this package that is

    imported = _imported(package, module, why)
    return [imported if isinstance(imported, Check) else ok(package, imported[1])]


def dali_package(cuda: str | None) -> str:
    """The DALI package that goes with a torch built for this CUDA version."""
    return "nvidia-dali-cuda120" if cuda and numbers(cuda) < (13,) else "nvidia-dali-cuda130"


def dali() -> list[Check]:
    """Import it, and decode a JPEG where training would."""
    import numpy as np
    import torch
    from PIL import Image

    package = dali_package(torch.version.cuda)
    try:
        module = importlib.import_module("nvidia.dali")
        fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    except TROUBLE as error:
        found = f"cannot be imported, Pillow decodes instead: {first_line(error)}"
        return [warning("dali", found, f"on Linux and x86-64: pip install {package}")]
    least = minima().get(package, "0")
    if numbers(module.__version__) < numbers(least):
        return [
            failed("dali", f"{module.__version__}, {least} or newer is needed", f"pip install -U '{package}>={least}'")
        ]
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp, 255 - ramp], axis=2)).save(buffer, "JPEG", quality=95)
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    on_gpu = torch.cuda.is_available()

    @module.pipeline_def(batch_size=1, num_threads=1, device_id=0 if on_gpu else None)
    def graph() -> Any:
        file = fn.external_source(lambda: [content], dtype=types.UINT8, ndim=1)
        return fn.decoders.image(file, device="mixed" if on_gpu else "cpu", output_type=types.RGB)

    try:
        output = graph().run()[0]
        pixels = np.array((output.as_cpu() if on_gpu else output).at(0))
    except TROUBLE as error:
        message = str(error).rpartition("encountered:")[2].strip() or type(error).__name__
        found = f"{module.__version__} does not decode a JPEG here: {message.splitlines()[0][:200]}"
        return [failed("dali", found, f"pip install -U {package}, or train with --data.decoder pillow")]
    expected = np.asarray(Image.open(buffer).convert("RGB"), np.float32)
    where = "on the GPU" if on_gpu else "on the CPU"
    if pixels.shape != expected.shape or np.abs(pixels - expected).mean() > 2:
        found = f"{module.__version__} decodes a JPEG {where} to other pixels than Pillow does"
        return [failed("dali", found, f"pip install -U {package} pillow, or train with --data.decoder pillow")]
    return [ok("dali", f"{module.__version__}, decodes a JPEG {where}")]


def native_kernels() -> list[Check]:
    """C kernels that train the networks on a CPU faster than torch does: for float32, and for bf16 with AMX."""
    import torch

    from kernels import native
    from pipeline import precision

    dtype = precision.dtype_of(precision.resolve("auto", torch.device("cpu")))
    arithmetic = str(dtype).removeprefix("torch.")
    try:
        processor = native.processor(dtype)
    except native.NativeError as error:
        return [ok("native kernels", f"not for this processor in {arithmetic} ({error}); torch's operators are used")]
    try:
        native.load(dtype=dtype)
    except native.NativeError as error:
        advice = "apt install gcc" if str(error) == native.NO_COMPILER else "nothing has to be done; it is slower"
        return [warning("native kernels", f"{error}; training on the CPU uses torch's operators", advice)]
    compiled = f"compiled for {arithmetic} on {processor}"
    return [ok("native kernels", f"{compiled}; the fastest for a run's networks is measured at its first start")]


def triton() -> list[Check]:
    """Optional: torch's own kernels do the same work, but for optim.backend triton on a GPU."""
    try:
        module = importlib.import_module("triton")
    except TROUBLE as error:
        return [ok("triton", f"not there; torch's kernels do the same work ({first_line(error)})")]
    try:
        on_gpu = importlib.import_module("torch").cuda.is_available()
    except TROUBLE:
        on_gpu = False  # torch has a line of its own
    compilers = (os.environ.get("CC") or "gcc", "gcc", "clang")  # Triton's own order
    if on_gpu and not any(map(shutil.which, compilers)):
        trouble = "on a GPU it needs a C compiler, and there is none: training ends at its start"
        without = " ".join(f"--kernels.{name} torch" for name in ("batchnorm", "image_ends", "gather"))
        return [warning("triton", trouble, f"apt install gcc python3-dev; or {without}")]
    return [ok("triton", module.__version__)]


def apex() -> list[Check]:
    """Optional: of apex only its fused Adam is still of interest, and torch has one of its own, which is used."""
    try:
        importlib.import_module("apex")
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except ModuleNotFoundError:
        return [ok("apex", "not installed, and not needed: torch's fused Adam is used")]
    except TROUBLE as error:
        return [ok("apex", f"installed without a FusedAdam that works, and not needed ({first_line(error)})")]
    return [ok("apex", "installed with FusedAdam; not needed: torch's fused Adam is used")]
