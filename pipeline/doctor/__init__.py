"""What launch/doctor.py looks at: software, hardware, folders, network, ranks, and a short training.

A look returns Checks and raises nothing.  Nothing here imports a package at the top of a file that may be missing or
broken on the machine, torch least of all: finding that out is the purpose.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
State = Literal["ok", "warning", "failed"]

TROUBLE = (
    *(ImportError, OSError, RuntimeError, ValueError, AttributeError, LookupError, TypeError, AssertionError),
    *(subprocess.SubprocessError, UserError),
)
"""What Python and the libraries raise on a machine that is not as they expect."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    """In one line."""
    advice: str = ""
    """What to do about it: a command or a setting.  Empty where all is well."""


def ok(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Check:
    """Training works, but worse or less safely than it could."""
    return Check(name, "warning", found, advice)


def failed(name: str, found: str, advice: str) -> Check:
    """Training cannot work, or not on what this machine has."""
    return Check(name, "failed", found, advice)


def look(name: str, body: Callable[..., list[Check]], *arguments: Any) -> list[Check]:
    """What a look finds; one that stumbles is itself a failed check, unless it only misses torch, which has its own."""
    try:
        return body(*arguments)
    except TROUBLE as error:
        if isinstance(error, ImportError) and sys.modules.get("torch") is None:
            return [warning(name, "not looked at, since torch cannot be imported", "install torch, then look again")]
        return [failed(name, f"looking at it ended with {first_line(error)}", "mend what it names, then look again")]


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says, not too long for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def size(num_bytes: float) -> str:
    """Bytes for a person: 512 KiB, 76.2 MiB, 12.0 GiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"


def several(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
