"""What can go wrong for a user, each with the exit code that a wrapper script sees.

A message is one line: the file or field, the rule, what was found.  0 done, 2 config (pipeline.config.ConfigError),
65 data, 74 input or output.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors that end a command with one line instead of a traceback."""

    exit_code = 1
    shared = False
    """Whether every rank raises it, so that one of them tells it."""


class DataError(UserError):
    """The photographs: missing, empty, unreadable, not the ones of the checkpoint."""

    exit_code = 65


class OtherDataError(DataError):
    """Photographs that are not those of the checkpoint: the run refuses them and stays as it was."""


class StorageError(UserError):
    """The disk: full, read-only, a checkpoint that does not match its manifest."""

    exit_code = 74
