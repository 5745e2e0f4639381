"""What the small commands share: a command line that fails in one line, with the exit code of the reason."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from pipeline.config import ConfigError
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its complaints as ConfigError instead of a usage text."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=name, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message + self._hint(message))

    def _hint(self, message: str) -> str:
        """The option that an unknown one is like, or what a missing argument is."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown.startswith("--"):
            options = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown.split()[0].split("=")[0], options, n=1, cutoff=0.6)
            return f"; did you mean {near[0]}?" if near else ""
        _, _, missing = message.partition("arguments are required: ")
        for action in self._actions if missing else ():
            name = action.option_strings[0] if action.option_strings else action.metavar
            if name == missing:
                choices = f"one of {', '.join(action.choices)}" if action.choices else ""
                return f" ({action.help or choices})"
        return ""


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to 2^63 - 1."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 1 << 63:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return integer


def device_of(name: str) -> torch.device:
    """The device that --device means; auto: a GPU where there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch  # not needed by all commands, and slow to come

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on its build
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        rule = f"--device must be a device of this machine, got {name!r}; torch finds {', '.join(found)}"
        raise ConfigError(rule) from error
    if device.type == "meta":
        raise ConfigError("--device must be a device of this machine, got 'meta'")
    return device


def run(name: str, body: Callable[[], None]) -> int:
    """The body's exit code: 0, or the error's own after one line `name: error: ...` on stderr.

    Of an error that every rank under torchrun raises alike, rank 0 prints it.
    """
    try:
        body()
    except (ConfigError, UserError) as error:
        if not error.shared or int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0
