"""Python's garbage collector, kept out of the steps.

Left alone it runs whenever enough objects have been made, on each rank at another step, and all ranks wait for the one
that collects.  So what is alive when training begins is frozen, the collector is off, and everything collects between
steps, every rank at the same one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY_STEPS = 500


@contextlib.contextmanager
def collected_between_steps() -> Iterator[None]:
    """While entered, nothing is collected but by `collect`; afterwards the collector is as it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect(_images_seen: int) -> None:
    """For the loop's maintenance: what has become garbage since training began, or since the last time."""
    gc.collect()
