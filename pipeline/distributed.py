"""The ranks: who they are, how they start, and what they tell each other.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them there is one rank and no process group.
Data and seeds go by the global rank, devices by the local one.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ConfigError, DistributedConfig
from pipeline.errors import UserError
from pipeline.rendezvous import fresh_store

T = TypeVar("T")

_NCCL_WITH_BF16 = (2, 10)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Rank 0: writes files, logs, decides."""
        return self.rank == 0


def rank_from_environment() -> int:
    """The global rank before any process group exists."""
    return int(os.environ.get("RANK", 0))


def from_environment() -> Ranks:
    """Who this process is, as torchrun says.

    Raises:
        ConfigError: more ranks on this machine than GPUs.
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc_per_node must be at most the {torch.cuda.device_count()} GPUs here, got {local_world_size}"
            )
        device = torch.device("cuda", local_rank)
    return Ranks(rank_from_environment(), int(os.environ.get("WORLD_SIZE", 1)), local_rank, local_world_size, device)


def start(cfg: DistributedConfig) -> Ranks:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs; also sets this rank's thread count.

    Raises:
        ConfigError: more ranks on this machine than GPUs.
    """
    ranks = from_environment()
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(ranks.device)
    torch.set_num_threads(num_threads(cfg, ranks.local_world_size))
    if ranks.world_size > 1:
        timeout = timedelta(seconds=cfg.start_timeout_s)
        store = fresh_store(ranks.rank, ranks.world_size, timeout)
        place: dict[str, Any] = {}
        if store is not None:
            place = {"store": store, "rank": ranks.rank, "world_size": ranks.world_size}
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=timeout, device_id=ranks.device if on_gpu else None, **place
        )
    return ranks


def num_threads(cfg: DistributedConfig, local_world_size: int) -> int:
    """Threads of one rank: as set, else an even share of the cores this process may use.

    torchrun sets OMP_NUM_THREADS=1 where it starts several ranks, which would leave cores idle.
    """
    return cfg.threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)


def stop() -> None:
    """Leave the process group, if there is one.  Not after an error that one rank meets alone: with a rank gone it may
    wait for ever."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Leave the process group at the end, and after an error that every rank raises."""
    try:
        yield
    except (ConfigError, UserError) as error:
        if error.shared:
            stop()
        raise
    stop()


def program(main: Callable[[], int]) -> NoReturn:
    """A rank's main() as all that its process does."""
    try:
        code = main()
    except Exception:  # noqa: BLE001  told as the interpreter does, which must not end this process itself
        sys.excepthook(*sys.exc_info())
        code = 1
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process with that exit code; at once after an error, or where it still belongs to a group.

    A group that could not be left keeps its threads, and so may what an error has interrupted.  Should the interpreter
    take itself apart under them, they may abort the process, and a scheduler would see that signal instead of the code.
    """
    if code or dist.is_initialized():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed: nobody is left to tell
                stream.flush()
        os._exit(code)
    sys.exit(code)


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone or does not answer."""
    known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    # gloo has no type of its own: its RuntimeErrors begin with the place in its source, all but this one.
    of_gloo = ("gloo", "Application timeout caused pair closure")
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(t in str(error) for t in of_gloo))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher() -> str:
    """The name of torchrun's job, which its restarts share; empty: none of torchrun's."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restart_count() -> int:
    """How often torchrun has started this rank's group anew; 0: the first start, or none of torchrun's."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def set_timeout(seconds: int) -> None:
    """From now on a missing rank is noticed after so long."""
    if not dist.is_initialized():
        return
    if hasattr(dist, "set_timeout"):  # torch 2.15; _set_pg_timeout before
        dist.set_timeout(timedelta(seconds=seconds))
    else:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def broadcast(value: T) -> T:
    """Rank 0's plain value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's plain value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def together(action: Callable[[], T]) -> T:
    """Run an action that may end the program with a user's error on every rank, and end them all with the same one.

    Without this a rank that stops leaves the others waiting until a time-out.
    """
    result: Any = None
    error: UserError | ConfigError | None = None
    try:
        result = action()
    except (UserError, ConfigError) as caught:
        error = caught
    first = next((e for e in gather(error) if e is not None), None)
    if first is not None:
        first.shared = True
        raise first
    return result


def leader_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Let the first rank of every machine do it, then the others, who find its result on disk."""
    result: Any = None

    def turn(mine: bool) -> Callable[[], Any]:
        return action if mine else lambda: None

    first = ranks.local_rank == 0
    result = together(turn(first))
    other = together(turn(not first))
    return result if first else other


def require_compression(cfg: DistributedConfig, ranks: Ranks) -> None:
    """
    Raises:
        ConfigError: the backend cannot add up what distributed.compress makes of gradients.
    """
    travels = cfg.compress == "bf16" and ranks.world_size > 1
    if travels and ranks.device.type == "cuda" and torch.cuda.nccl.version() < _NCCL_WITH_BF16:
        raise ConfigError("distributed.compress must be none where NCCL is older than 2.10, got 'bf16'")


class LateReduction:
    """Averages of gradients over the ranks that need not be there when backward ends, only after wait().

    A hook for DistributedDataParallel, which takes the gradients of a bucket for averaged at once.  With
    gradient_as_bucket_view they lie in the bucket itself, where the average then arrives.
    """

    def __init__(self, ranks: Ranks, compress: str) -> None:
        self.ranks, self.compress = ranks, compress
        self._travelling: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def send(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Send a bucket on its way."""
        buffer = bucket.buffer()
        if self.compress == "bf16":
            sent = buffer.to(torch.bfloat16).div_(self.ranks.world_size)  # as bf16_compress_hook does it
        else:
            sent = buffer.mul_(1.0 / self.ranks.world_size)  # as DistributedDataParallel itself rounds
        self._travelling.append((dist.all_reduce(sent, async_op=True), sent, buffer))
        devices: list[int | str | torch.device] | None = [self.ranks.device] if sent.is_cuda else None
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        future.set_result(buffer)
        return future

    def wait(self) -> None:
        """Have the averages in place; on a GPU the stream waits, not the host."""
        for work, sent, buffer in self._travelling:
            work.wait()
            if sent is not buffer:
                buffer.copy_(sent)
        self._travelling.clear()


def wrap(
    network: nn.Module, ranks: Ranks, cfg: DistributedConfig, late: LateReduction | None = None
) -> DistributedDataParallel:
    """The network under DistributedDataParallel: small buckets that travel during backward, no buffer traffic.

    Every rank keeps its own BatchNorm statistics during training; parameters and buffers start as rank 0's.

    Args:
        late: takes care of the gradients, which are averaged only after its wait().
    """
    without_sync: dict[str, Any] = {"forward_sync_buffers": False}  # torch 2.13 and later
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel.__init__).parameters:
        without_sync = {"broadcast_buffers": False}  # skips the first broadcast as well
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
    wrapped = DistributedDataParallel(
        network,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        bucket_cap_mb=cfg.bucket_cap_mb,
        gradient_as_bucket_view=True,
        **without_sync,
    )
    if late is not None:
        wrapped.register_comm_hook(None, lambda _state, bucket: late.send(bucket))  # torch reads annotations as types
    elif cfg.compress == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def synchronise_batchnorm(network: nn.Module, ranks: Ranks) -> None:
    """Exchange the network's BatchNorm layers for ones with statistics over all ranks.

    Raises:
        ConfigError: the ranks have no GPU; torch's SyncBatchNorm refuses the CPU.
    """
    if ranks.device.type != "cuda":
        raise ConfigError("distributed.sync_batchnorm must be false on a CPU, got True")
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place, since the network itself is no BatchNorm
