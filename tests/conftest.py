from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch

# Networks of a few channels gain nothing from a second thread, and two test runs on one machine lose much.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("system") and config.getoption("-m") != "system":
            item.add_marker(pytest.mark.skip(reason="needs root or a Debian package: make test-system"))
        if item.get_closest_marker("docs") and config.getoption("-m") != "docs":
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-docs"))
        if item.get_closest_marker("faults") and config.getoption("-m") != "faults":
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-faults"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_leaks(monkeypatch: pytest.MonkeyPatch):
    """A test that leaves a thread, a process or an environment variable behind fails."""
    threads, variables = set(threading.enumerate()), dict(os.environ)
    yield
    monkeypatch.undo()
    deadline = time.monotonic() + 5  # a pool that was told to end needs a moment
    while (left := _threads(threads) + _children()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not left, f"threads or processes left behind: {left}"
    changed = {k for k in variables.keys() | os.environ.keys() if variables.get(k) != os.environ.get(k)}
    # torch sets the latter two when its compiler is first imported, which an optimiser does, and first used.
    torchs = {"TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    assert not changed - torchs - {"PYTEST_CURRENT_TEST"}, f"environment variables left behind: {changed}"


def _threads(before: set[threading.Thread]) -> list[str]:
    return [t.name for t in set(threading.enumerate()) - before if t.is_alive() and not _kept(t)]


def _kept(thread: threading.Thread) -> bool:
    # Pools that a library starts once a process and keeps.
    return thread.name.startswith(("Thread-autograd", "pin_memory", "asyncio", "tqdm_monitor"))


def _children() -> list[str]:
    """Command lines of our child processes; multiprocessing keeps one to track its resources."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread or a child that has just ended
            for pid in (task / "children").read_text().split():
                words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
                command = b" ".join(words).decode(errors="replace").strip()
                if command and "resource_tracker" not in command:
                    found.append(command)
    return found
