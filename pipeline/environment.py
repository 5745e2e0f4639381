"""What a run or a benchmark ran on: hardware, versions, commit, command.  For env.json and result lines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_CODE = ("--", ".", ":!benchmarks/results")  # a recorded line does not change what the next one measures
_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "tensorboard", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name, with the instruction sets that matter here."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return name + (" with AMX" if torch.cpu._is_amx_tile_supported() else "")


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": gpus,
    }
    return found | ({"onednn_max_cpu_isa": limit} if limit else {})


def commit() -> tuple[str, bool]:
    """The commit of this clone, and whether the working tree differs from it; ("unknown", True) outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(("git", "-C", ROOT, *words), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", *_CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def describe() -> dict[str, Any]:
    """All of it, as plain values."""
    revision, dirty = commit()
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": revision,
        "dirty": dirty,
        "hardware": hardware(),
        "versions": versions(),
    }
