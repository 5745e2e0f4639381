"""What is raised for a setting that cannot work.  Free of all else, so that every part of the settings can use it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work: one line with the key, the rule and what was found.  Ends the program with 2."""

    exit_code = 2
    shared = False
    """Whether every rank raises it, so that one of them tells it."""


def require(holds: bool, key: str, rule: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {rule}, got {found!r}")
