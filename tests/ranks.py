"""Several gloo ranks in one test.  A spawn costs seconds: put many checks into one function."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipeline.distributed import Ranks


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
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_body, (fn, world_size, store, arguments), nprocs=world_size)
