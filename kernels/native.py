"""The C kernels of kernels/csrc: compiled once a machine by its C compiler, loaded without any further package.

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
FLAGS = ("-O3", "-march=sapphirerapids", "-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden")
NO_COMPILER = "there is no C compiler (gcc 11 or newer)"
_NEEDED = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512vbmi", "bmi2"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of malloc.h."""
COMPILE_S = 300
"""Seconds after which a compiler is given up."""

_library: ctypes.CDLL | None = None


class NativeError(Exception):
    """Why the C kernels cannot be had here, in a few words."""


def default_folder() -> Path:
    """Where the compiled library is kept if nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "dcgan-faces"


def loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _library is not None


def load(folder: Path | None = None) -> None:
    """Make the C kernels ready, compiling them where `folder` does not hold them yet.  May be called again.

    Args:
        folder: where the library is kept; processes may share it.

    Raises:
        NativeError: the processor has no AMX, there is no compiler, or it failed.
    """
    global _library
    if _library is not None:
        return
    if not torch.cpu._is_amx_tile_supported():
        raise NativeError("the processor has no AMX")
    missing = _NEEDED - _cpu_flags()
    if missing:
        raise NativeError(f"the processor lacks {', '.join(sorted(missing))}")
    found = _build(folder or default_folder())
    if found.dcgan_amx_begin():
        raise NativeError("the system does not let programs use AMX tiles")
    _keep_freed_memory()
    _library = found


def _keep_freed_memory() -> None:
    """Let the C library's malloc keep what is freed, for this process.

    Activations are freed and taken again at every step; given back to the system in between, as large pieces are, their
    pages are filled with zeros each time: a fifth of a step at 512 images, 2 to 4 % at 128 (2 cores, 2026-11).
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def library() -> ctypes.CDLL:
    """The C kernels, after `load`."""
    assert _library is not None, "native.load() comes first"
    return _library


def _cpu_flags() -> set[str]:
    """What the processor can do, by the system's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        raise NativeError(f"/proc/cpuinfo cannot be read ({error.strerror})") from error
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compiler() -> list[str]:
    """CC, which may be several words, else gcc."""
    for words in (shlex.split(os.environ.get("CC", "")), ["gcc"], ["cc"]):
        if words and shutil.which(words[0]):
            return words
    raise NativeError(NO_COMPILER)


def _digest() -> str:
    """Changes whenever the compiled library would."""
    content = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _build(folder: Path) -> ctypes.CDLL:
    """The kept library, or one that is compiled now; kept only when it can be loaded."""
    try:
        target = folder / f"native-{_digest()}.so"
        if target.exists():
            with contextlib.suppress(OSError):  # cut short, or made for another system: made anew
                return ctypes.CDLL(str(target))
        compiler = _compiler()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="native-") as scratch:
            made, objects = Path(scratch) / "library.so", []
            for source in sorted(SOURCES.glob("*.c")):
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                _run(*compiler, *FLAGS, "-c", str(source), "-o", objects[-1])
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
