"""What can go wrong for a user, each with the exit code that a wrapper script sees.

A message is one line: the file or field, the rule, what was found.  0 done, 2 config (pipeline.config.ConfigError),
65 data, 74 input or output, 75 stopped before the end and to be started again, 76 diverged.
"""

from __future__ import annotations

from typing import Self


class UserError(Exception):
    """Base of the errors that end a command with one line instead of a traceback."""

    exit_code = 1
    shared = False
    """Whether every rank raises it, so that one of them tells it."""

    def on_every_rank(self) -> Self:
        """The error, marked as one that every rank raises."""
        self.shared = True
        return self


class SettingsError(UserError):
    """Settings of which only training could find out that they cannot work."""

    exit_code = 2


class DataError(UserError):
    """The photographs: missing, empty, unreadable, not the ones of the checkpoint."""

    exit_code = 65


class OtherDataError(DataError):
    """Photographs that are not those of the checkpoint: the run refuses them and stays as it was."""


class StorageError(UserError):
    """The disk: full, read-only, a checkpoint that does not match its manifest."""

    exit_code = 74


class Diverged(UserError):
    """Training that cannot be brought back to finite numbers, or has collapsed where watch.on_collapse says stop."""

    exit_code = 76


class Preempted(Exception):
    """Told to stop before the end: by a signal, or by train.max_minutes.  Raised at the same step on every rank."""

    exit_code = 75

    def __init__(self, reason: str, images_seen: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.images_seen = images_seen
