"""Batches on their way to the GPU: pinned memory used again and again, and a stream beside the training's own.

Pinning memory is a call into the driver that waits for the device, so no batch pins its own.  A buffer of the ring may
be filled anew once the copy out of it is done, which an event tells that was recorded behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Buffer:
    """One place of a ring: filled by the reading thread, sent by the trainer's."""

    def __init__(self, tensor: Tensor, event: Any) -> None:
        self.tensor = tensor
        self._event = event
        self._filled = self._sent = False

    def wait_until_free(self) -> None:
        """Till the copy out of it is done."""
        assert self._sent or not self._filled, "a batch that nobody has sent yet would be overwritten"
        if self._sent:
            self._event.synchronize()
        self._filled, self._sent = True, False

    def sent(self) -> None:
        """The copy out of it has been asked for on this thread's current stream."""
        self._event.record()
        self._sent = True

    def to(self, device: torch.device) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        there = self.tensor.to(device, non_blocking=True)
        self.sent()
        return there


class PinnedRing:
    """Buffers of one shape, taken in turn.

    Args:
        depth: filled buffers that wait at most, the one being filled included.  The ring has one more, which is being
            sent, and another, so that filling need not wait for the copy just asked for.
        device: the GPU whose driver pins them.
        allocate, event: for tests.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        depth: int,
        device: torch.device,
        *,
        allocate: Callable[..., Tensor] | None = None,
        event: Callable[[], Any] | None = None,
    ) -> None:
        def pinned() -> Tensor:
            with torch.cuda.device(device):
                return torch.empty(shape, dtype=dtype, pin_memory=True)

        self.buffers = [Buffer((allocate or pinned)(), (event or torch.cuda.Event)()) for _ in range(depth + 2)]
        self._taken = 0

    def take(self) -> Buffer:
        """The next one, free to be filled."""
        buffer = self.buffers[self._taken % len(self.buffers)]
        self._taken += 1
        buffer.wait_until_free()
        return buffer


class Pending:
    """A batch that is being made."""

    def __init__(self, batch: Tensor, made: Any) -> None:
        self.batch, self.made = batch, made


class SideStream:
    """A stream on which the next batch is made while the step computes on the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # what batches are made from lies there already

    def begin(self, make: Callable[[], Tensor]) -> Pending:
        """Ask for a batch; make allocates its memory and launches its work, and waits for nothing."""
        with torch.cuda.stream(self.stream):
            batch = make()
            made = torch.cuda.Event()
            made.record()
        return Pending(batch, made)

    def hand_over(self, pending: Pending) -> Tensor:
        """The batch, for use on the current stream, which waits for it; the host does not."""
        here = torch.cuda.current_stream(self.device)
        here.wait_event(pending.made)
        pending.batch.record_stream(here)  # its memory is the side stream's again only when this one is done with it
        return pending.batch
