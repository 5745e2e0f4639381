"""Several gloo ranks in one test, and the trainer's command on several ranks.

The ranks are forked from a server that has imported the test's module once; without it each would import torch for
itself, which takes 3 to 20 s on two cores.  Still put many checks into one function.
"""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipeline.distributed import Ranks
from tests.commands import free_port


@contextlib.contextmanager
def _server(*modules: str) -> Iterator[None]:
    """A server that has imported these modules; it ends here, since each test must leave no process."""
    multiprocessing.set_forkserver_preload(list(modules))
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


@dataclass(frozen=True)
class Launch:
    """launch/train.py with these words on so many ranks."""

    world_size: int
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def _nothing(_launch: int, _rank: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _launches_body(
    rank: int, launches: list[Launch], ports: list[int], codes: Path, around: Callable[[int, int], Any]
) -> None:
    from pipeline.cli.train import main

    for number, (launch, port) in enumerate(zip(launches, ports, strict=True)):
        if rank >= launch.world_size:  # stands aside; the others do not wait for it
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(launch.world_size), "LOCAL_WORLD_SIZE": str(launch.world_size)}
        os.environ |= launch.environment
        with around(number, rank):
            code = main(launch.words)
        if dist.is_initialized():  # after an error: the process would have ended
            dist.destroy_process_group()
        for name in launch.environment:
            del os.environ[name]
        (codes / f"{number}-{rank}").write_text(str(code))


def run_launches(
    launches: list[Launch],
    around: Callable[[int, int], Any] = _nothing,
) -> list[list[int]]:
    """Launch after launch, each on its ranks: processes with the environment variables that torchrun sets.

    Args:
        around: a function of a module; called with the launch's number and the rank, gives what is entered around it.

    Returns:
        For each launch the exit codes in rank order.
    """
    ports = [free_port() for _ in launches]
    with (
        tempfile.TemporaryDirectory() as folder,
        _server(around.__module__, "pipeline.cli.train", "pipeline.decode.pillow"),
    ):
        torch.multiprocessing.start_processes(
            _launches_body,
            (launches, ports, Path(folder), around),
            nprocs=max(launch.world_size for launch in launches),
            start_method="forkserver",
        )
        return [
            [int((Path(folder) / f"{n}-{rank}").read_text()) for rank in range(launch.world_size)]
            for n, launch in enumerate(launches)
        ]
