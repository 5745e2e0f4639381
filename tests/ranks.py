"""Several gloo ranks in one test, and the trainer's command on several ranks.

The ranks are forked from a server that has imported the test's module once; without it each would import torch for
itself, which takes 3 to 20 s on two cores.  Still put many checks into one function.
"""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipeline.distributed import Ranks


@contextlib.contextmanager
def _server(module: str) -> Iterator[None]:
    """A server that has imported a module; it ends here, since each test must leave no process."""
    multiprocessing.set_forkserver_preload([module, "pipeline.decode.pillow"])
    try:
        yield
    finally:
        multiprocessing.forkserver._forkserver._stop()


def _body(rank: int, fn: Callable[..., Any], world_size: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        fn(Ranks(rank, world_size, rank, world_size, torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call fn(ranks, *arguments) on world_size gloo processes; raises when any of them raises.

    Args:
        fn: a function of a module; its assertions are the test.
    """
    with tempfile.TemporaryDirectory() as folder, _server(fn.__module__):
        store = str(Path(folder) / "store")
        torch.multiprocessing.start_processes(
            _body, (fn, world_size, store, arguments), nprocs=world_size, start_method="forkserver"
        )
