"""A store that belongs to this start of the ranks alone.

torchrun's agents keep one store for a whole job, and a group of ranks that is started anew finds there what the group
before it left, the addresses of its dead sockets among them: about every second restart then ends with "Connection
refused" (torch 2.11 and 2.15, gloo, --standalone, 2026-11).  The restart count would not do as a name for a start:
torchrun does not raise it when a node comes or goes.  So the ranks agree on a fresh name, by keys that nobody has
used before.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.02


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The agents' store under a name of this start's own; None: there are no agents, so the store is new anyway.

    Raises:
        TimeoutError: not all ranks came in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, world_size=None, is_master=False, timeout=timeout)
    return dist.PrefixStore(agree(dist.PrefixStore("dcgan", store), rank, world_size, timeout), store)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this start get and no earlier one had.

    Each rank says hello under its number with a word of its own; rank 0 answers under that word, which only the living
    wait for, and goes on until each rank has taken the answer.

    Raises:
        TimeoutError: not all ranks came in time.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"hello/{rank}", word)
        try:
            store.wait([f"welcome/{word}"], timeout)
        except dist.DistStoreError:
            raise TimeoutError(f"rank 0 did not answer within {timeout.total_seconds():g} seconds") from None
        name = store.get(f"welcome/{word}").decode()
        store.set(f"taken/{name}/{rank}", "")
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
            if store.check([f"taken/{name}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():g} seconds")
        time.sleep(_POLL_S if missing else 0)
    return name
