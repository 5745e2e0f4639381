"""The C kernels of kernels/csrc: compiled once a machine by its C compiler, loaded without any further package.

There are two libraries.  That for bfloat16 is for processors with AMX; that for float32 for any with AVX2, and takes
AVX-512 where it is there.

Plain C and ctypes rather than torch.utils.cpp_extension: it takes the compiler two seconds instead of a minute, needs
neither C++ nor ninja nor Python's headers, and one library serves every version of torch.  It is linked with no OpenMP
of its own: its loops run on the threads that torch has already started, since two teams on the same cores would wait
for each other in a spin.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden")
NO_COMPILER = "there is no C compiler (gcc 11 or newer)"
_FOR_AMX = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512vbmi", "bmi2"}
_FOR_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_FOR_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
_BELOW_AVX512 = {"AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
_BELOW_AVX2 = {"SSE41", "AVX"}
"""Limits that ONEDNN_MAX_CPU_ISA may set, which hold here too: who measures a smaller processor means all of it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of malloc.h."""
COMPILE_S = 300
"""Seconds after which a compiler is given up."""

_libraries: dict[torch.dtype, ctypes.CDLL] = {}


class NativeError(Exception):
    """Why the C kernels cannot be had here, in a few words."""


def default_folder() -> Path:
    """Where the compiled libraries are kept if nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "dcgan-faces"


def loaded(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether `load` has succeeded in this process."""
    return dtype in _libraries


def load(folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make the C kernels ready, compiling them where `folder` does not hold them yet.  May be called again.

    Args:
        folder: where the library is kept; processes may share it.
        dtype: bfloat16 or float32: which of the libraries.

    Raises:
        NativeError: the processor has not the instructions, there is no compiler, or it failed.
    """
    assert dtype in (torch.bfloat16, torch.float32), dtype
    if dtype in _libraries:
        return
    sources = SOURCES / "float32" if dtype == torch.float32 else SOURCES
    found = _build(folder or default_folder(), sources, (*FLAGS, f"-march={processor(dtype)}"))
    if dtype == torch.bfloat16 and found.dcgan_amx_begin():
        raise NativeError("the system does not let programs use AMX tiles")
    _keep_freed_memory()
    _libraries[dtype] = found


def isa_limit() -> str:
    """The largest instruction set that oneDNN may use, by its own name for it; ALL: whatever there is."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()


def amx_allowed() -> bool:
    """Whether that limit leaves AMX."""
    return isa_limit() in ("ALL", "DEFAULT") or "AMX" in isa_limit()


def processor(dtype: torch.dtype) -> str:
    """What the library for this type is compiled for here, by gcc's name: x86-64-v4 is AVX-512, x86-64-v3 AVX2.

    Raises:
        NativeError: the processor has not the instructions, or ONEDNN_MAX_CPU_ISA forbids them.
    """
    limit = isa_limit()
    if dtype == torch.bfloat16:
        if not torch.cpu._is_amx_tile_supported():
            raise NativeError("the processor has no AMX")
        if not amx_allowed():
            raise NativeError(f"ONEDNN_MAX_CPU_ISA={limit} forbids AMX")
        _need(_FOR_AMX)
        return "sapphirerapids"
    if limit in _BELOW_AVX2:
        raise NativeError(f"ONEDNN_MAX_CPU_ISA={limit} forbids AVX2")
    if _cpu_flags() >= _FOR_AVX2 | _FOR_AVX512 and limit not in _BELOW_AVX512:
        return "x86-64-v4"
    _need(_FOR_AVX2)
    return "x86-64-v3"


def _keep_freed_memory() -> None:
    """Let the C library's malloc keep what is freed, for this process.

    Activations are freed and taken again at every step; given back to the system in between, as large pieces are, their
    pages are filled with zeros each time: a fifth of a step at 512 images, 2 to 4 % at 128 (2 cores, 2026-11).
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def library(dtype: torch.dtype = torch.bfloat16) -> ctypes.CDLL:
    """The C kernels, after `load`."""
    assert dtype in _libraries, f"native.load(dtype={dtype}) comes first"
    return _libraries[dtype]


def _need(flags: set[str]) -> None:
    missing = flags - _cpu_flags()
    if missing:
        raise NativeError(f"the processor lacks {', '.join(sorted(missing))}")


def _cpu_flags() -> set[str]:
    """What the processor can do, by the system's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        raise NativeError(f"/proc/cpuinfo cannot be read ({error.strerror})") from error
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compiler() -> list[str]:
    """CC, which may be several words, else gcc.  Another compiler than gcc may lack what the float32 kernels use."""
    for words in (shlex.split(os.environ.get("CC", "")), ["gcc"], ["cc"]):
        if words and shutil.which(words[0]):
            return words
    raise NativeError(NO_COMPILER)


def _digest(sources: Path, flags: tuple[str, ...]) -> str:
    """Changes whenever the compiled library would."""
    content = hashlib.sha256(repr(flags).encode())
    for path in sorted({*sources.glob("*.[ch]"), *SOURCES.glob("*.h")}):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _build(folder: Path, sources: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The kept library, or one that is compiled now; kept only when it can be loaded."""
    try:
        target = folder / f"native-{_digest(sources, flags)}.so"
        if target.exists():
            with contextlib.suppress(OSError):  # cut short, or made for another system: made anew
                return ctypes.CDLL(str(target))
        compiler = _compiler()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="native-") as scratch:
            made, objects = Path(scratch) / "library.so", []
            for source in sorted(sources.glob("*.c")):
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                _run(*compiler, *flags, "-c", str(source), "-o", objects[-1])
            # Without -fopenmp: OpenMP's functions are left for torch's own libgomp to fill in.
            _run(*compiler, "-shared", "-o", str(made), *objects)
            found = ctypes.CDLL(str(made))
            made.replace(target)
            return found
    except OSError as error:
        raise NativeError(f"{folder}: {error.strerror or error}") from error


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMPILE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{words[0]} did not end within {COMPILE_S} s") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NativeError(f"{words[0]} failed: {said}")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """A dense tensor's memory, for C.  It does not keep the tensor: whoever calls must hold it by a name."""
    assert tensor is None or (tensor.device.type == "cpu" and tensor.is_contiguous()), tensor.shape
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)
