"""Being told to stop: SIGTERM, SIGINT, SIGUSR1 and SIGHUP as a request that the training loop finds when it looks.

A handler only notes the signal, because SIGTERM is ambiguous: torchrun sends it before a preemption, and also to those
whose peer has died.  What to do is for the ranks to agree on (pipeline/vote.py).  A second signal ends the process at
once, even where the main thread waits inside a library: Python writes each signal's number to a socket that a thread
reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from pipeline.errors import Preempted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

SAME_REQUEST_S = 1.0
"""Signals this close together are one request: Slurm signals a job's launcher and its workers both, and the launcher
passes its own on."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the system send SIGTERM when the process that started this one dies, however it does (Linux).

    Workers whose torchrun was killed would otherwise go on unseen.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def heed_as_first_process() -> None:
    """Have a container's first process end when it is told to stop, until someone takes the signals.

    The kernel drops a signal to process 1 that would get the default action; `docker stop` would wait in vain.
    """
    if os.getpid() == 1:
        for number in (*STOPPING, signal.SIGQUIT):
            signal.signal(number, lambda *_: sys.exit(Preempted.exit_code))


class StopSignals:
    """Takes the signals while it is entered; the main thread's only.

    Before `training` is set a signal raises Preempted in the main thread: there is nothing to save yet.  Afterwards it
    is only noted in `received`.

    Args:
        at_once: called with the number of a second signal, just before the process ends with 128 + that number.
    """

    def __init__(self, at_once: Callable[[int], None] = lambda _number: None) -> None:
        self.received = 0
        """Number of the first signal; 0: none."""
        self.training = False
        self.at_once = at_once
        self._first_at = 0.0
        self._former: dict[int, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can: whoever runs us in another one keeps the signals to himself
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._stack.callback(reader.close)
        watcher = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watcher.start()
        self._stack.callback(watcher.join)
        self._stack.callback(writer.close)  # the watcher reads the end of it
        self._stack.callback(signal.set_wakeup_fd, former_fd)
        for number in STOPPING:
            self._stack.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        """In the main thread, as soon as it runs Python again."""
        first = not self.received
        self.received = self.received or number
        if first and not self.training:
            raise Preempted(f"{signal.Signals(number).name} before the first step")

    def _watch(self, reader: socket.socket) -> None:
        """In its own thread, at once."""
        while numbers := reader.recv(64):
            for number in numbers:
                if number not in STOPPING:
                    continue
                now = time.monotonic()
                if not self._first_at:
                    self._first_at = now
                elif now - self._first_at > SAME_REQUEST_S:
                    last_words = threading.Thread(target=self.at_once, args=(number,), daemon=True)
                    last_words.start()
                    last_words.join(1.0)  # a disk that hangs must not keep us
                    os._exit(128 + number)
