"""What the small commands share: a command line that fails in one line, with the exit code of the reason."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.config import ConfigError
from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its complaints as ConfigError instead of a usage text."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=name, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


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


def run(name: str, body: Callable[[], None]) -> int:
    """The body's exit code: 0, or the error's own after one line `name: error: ...` on stderr."""
    try:
        body()
    except (ConfigError, UserError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0
