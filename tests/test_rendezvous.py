"""Ranks that are started anew beside the traces of those before them agree on a name of their own."""

from datetime import timedelta
from threading import Thread

import pytest
import torch.distributed as dist

from pipeline.rendezvous import agree

SOON = timedelta(seconds=20)


def names(store: dist.Store, world_size: int) -> list[str]:
    found: dict[int, str] = {}
    ranks = [Thread(target=lambda r=r: found.update({r: agree(store, r, world_size, SOON)})) for r in range(world_size)]
    for rank in reversed(ranks):
        rank.start()
    for rank in ranks:
        rank.join()
    return [found[r] for r in range(world_size)]


def test_every_start_gets_a_name_of_its_own_whatever_the_ones_before_it_left():
    store = dist.HashStore()
    seen = set()
    for world_size in (2, 4, 1, 2, 3):  # nodes come and go
        found = names(store, world_size)
        assert len(set(found)) == 1
        assert not seen & set(found)
        seen |= set(found)


def test_a_greeting_of_the_dead_does_not_count_as_a_rank():
    store = dist.HashStore()
    store.set("hello/1", "a rank that has died since")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come"):
        agree(store, 0, 2, timedelta(seconds=0.2))


def test_without_rank_0_the_others_give_up():
    with pytest.raises(TimeoutError, match="rank 0 did not answer"):
        agree(dist.HashStore(), 1, 2, timedelta(seconds=0.2))
