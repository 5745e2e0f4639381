"""Work on many images shared among the ranks, its results whole on each of them.

Images are taken in chunks of fixed numbers, one after another by the ranks in turn.  So a batch is the same whatever
the number of ranks, and with it each result to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import Ranks

CHUNK = 64
"""Images at a time."""


def shares(count: int, ranks: Ranks, chunk: int = CHUNK) -> list[range]:
    """The chunks of 0 .. count - 1 that are this rank's, in order; of all ranks the same number, at the end empty."""
    turns = -(-count // (chunk * ranks.world_size))
    starts = [(turn * ranks.world_size + ranks.rank) * chunk for turn in range(turns)]
    return [range(min(start, count), min(start + chunk, count)) for start in starts]


def gathered(make: Callable[[range], Tensor], count: int, ranks: Ranks, like: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """make(numbers) of all chunks below `count`, end to end, on every rank; collective.

    Chunk by chunk, so that no rank waits longer for the others than a chunk takes.

    Args:
        make: (len(numbers), ...) of `like`'s shape but for the first, type and device; called for what is not empty.
        like: (0, ...) on the device through which the ranks speak.
        chunk: images at a time.

    Returns:
        (count, ...) on the CPU.
    """
    out = torch.empty((count, *like.shape[1:]), dtype=like.dtype)
    for turn, share in enumerate(shares(count, ranks, chunk)):
        made = make(share) if len(share) else like
        start = turn * ranks.world_size * chunk
        if ranks.world_size == 1:
            out[start : start + len(made)] = made
            continue
        padded = like.new_zeros((chunk, *like.shape[1:]))
        padded[: len(made)] = made
        of_all = [torch.empty_like(padded) for _ in range(ranks.world_size)]
        dist.all_gather(of_all, padded)
        whole = torch.cat(of_all)[: count - start]
        out[start : start + len(whole)] = whole
    return out
