"""A written-down model of many GPUs: from the step on one GPU, the bytes of gradients and the links to images/s.

The step of W GPUs takes what it takes on one, and besides what of the gradients' all-reduce does not fit behind
backward.  A network's gradients travel in equal buckets, each as soon as backward has made it:

    all-reduce of b bytes   start_s
      within a node of g    + 2 (g - 1) hop_s + 2 (g - 1) / g * b / bandwidth    reduce-scatter, all-gather in a ring
      between n nodes       + 2 ceil(log2 n) hop_s + 2 (n - 1) / n * (b / g) / bandwidth   a tree, each GPU its share
    a network with k buckets: the last bucket has nothing to hide behind; the others have (k - 1) / k of its backward.
    exposed = one + max(0, (k - 1) * one - (k - 1) / k * backward), one = the all-reduce of one bucket.

The vote's all-reduce is read a step later and is left out; so are stragglers, input and checkpoints: what is printed is
an upper bound by the links, no promise.  Links reach `achieved` of their bandwidth.

Legend: W GPUs, g of them a node, n nodes, b bytes, k buckets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What GPUs send each other through."""

    name: str
    bytes_per_s: float
    """Of one GPU in one direction."""
    hop_s: float
    """From one GPU to the next, whatever the size."""
    source: str


_TUNING = "hop: NCCL's own model, src/graph/tuning.cc (hwLat, Simple)"
NVLINK_4 = Link("NVLink 4", 450e9, 3.4e-6, f"H100 data sheet, 900 GB/s both ways; {_TUNING}, ring, 3.4 us")
NVLINK_5 = Link("NVLink 5", 900e9, 3.4e-6, f"B200 data sheet, 1.8 TB/s both ways; {_TUNING}, ring, 3.4 us")
PCIE_5 = Link("PCIe 5 x16", 63e9, 5.7e-6, f"PCI Express base specification 5.0, 32 GT/s; {_TUNING}, ring, 5.7 us")
NDR = Link("InfiniBand NDR", 50e9, 14e-6, f"400 Gb/s a port, a port a GPU; {_TUNING}, tree over the network, 14 us")
HDR = Link("InfiniBand HDR", 25e9, 14e-6, f"200 Gb/s a port, a port a GPU; {_TUNING}, tree over the network, 14 us")
ETHERNET_100 = Link(
    "Ethernet 100G", 1.5625e9, 28e-6, f"100 Gb/s a node of 8, shared; twice the hop of InfiniBand, assumed; {_TUNING}"
)
WITHIN = {"nvlink4": NVLINK_4, "nvlink5": NVLINK_5, "pcie5": PCIE_5}
BETWEEN = {"ndr": NDR, "hdr": HDR, "ethernet100": ETHERNET_100}
"""By the names of benchmarks.scaling's options."""


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    within: Link = NVLINK_4
    between: Link = NDR
    gpus_per_node: int = 8
    achieved: float = 0.8
    """Share of a link's bandwidth that reaches the gradients: an assumption, nccl-tests usually show 0.75 to 0.9."""
    start_s: float = 8.4e-6
    """Of an all-reduce, before its first byte: NCCL's baseLat, ring, Simple (src/graph/tuning.cc)."""

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of one all-reduce over so many GPUs; 0 on a single one."""
        if num_gpus == 1:
            return 0.0
        local = min(num_gpus, self.gpus_per_node)
        nodes = math.ceil(num_gpus / local)
        found = self.start_s
        for members, hops, share, link in (
            (local, local - 1, num_bytes, self.within),
            (nodes, math.ceil(math.log2(nodes)), num_bytes / local, self.between),
        ):
            found += 2 * hops * link.hop_s
            found += 2 * (members - 1) / members * share / (self.achieved * link.bytes_per_s)
        return found


@dataclass(frozen=True)
class Network:
    """One of the two networks, as far as its gradients are concerned."""

    gradient_bytes: float
    num_buckets: int
    backward_share: float
    """Of the step's seconds, the backward pass that makes these gradients."""

    def exposed_s(self, step_s: float, cluster: Cluster, num_gpus: int) -> float:
        """Seconds a step that its all-reduce adds."""
        one = cluster.all_reduce_s(self.gradient_bytes / self.num_buckets, num_gpus)
        rest = self.num_buckets - 1
        return one + max(0.0, rest * one - rest / self.num_buckets * self.backward_share * step_s)


@dataclass(frozen=True)
class Point:
    """What the model says of so many GPUs."""

    num_gpus: int
    batch_per_gpu: float
    step_s: float
    exposed_s: float
    images_per_s: float
    efficiency: float
    """Images/s over so many times those of one GPU, at its own batch for weak, at the whole one for strong scaling."""


def step_s_at(batch: float, measured: Mapping[int, float]) -> float:
    """Seconds of a step at this batch: measured ones joined by lines.

    Below the smallest the time does not fall any further, since launches remain; above the largest it grows in
    proportion.
    """
    sizes = sorted(measured)
    if batch <= sizes[0]:
        return measured[sizes[0]]
    if batch >= sizes[-1]:
        return measured[sizes[-1]] * batch / sizes[-1]
    above = next(i for i, size in enumerate(sizes) if size >= batch)
    low, high = sizes[above - 1], sizes[above]
    return measured[low] + (measured[high] - measured[low]) * (batch - low) / (high - low)


def weak(
    batch: int, num_gpus: int, measured: Mapping[int, float], networks: tuple[Network, ...], cluster: Cluster
) -> Point:
    """Every GPU has a batch of its own of that size."""
    alone = step_s_at(batch, measured)
    exposed = sum(network.exposed_s(alone, cluster, num_gpus) for network in networks)
    step = alone + exposed
    return Point(num_gpus, batch, step, exposed, num_gpus * batch / step, alone / step)


def strong(
    batch: int, num_gpus: int, measured: Mapping[int, float], networks: tuple[Network, ...], cluster: Cluster
) -> Point:
    """All GPUs share one batch of that size."""
    share = batch / num_gpus
    alone = step_s_at(share, measured)
    exposed = sum(network.exposed_s(alone, cluster, num_gpus) for network in networks)
    step = alone + exposed
    one_gpu = batch / step_s_at(batch, measured)
    return Point(num_gpus, share, step, exposed, batch / step, batch / step / (num_gpus * one_gpu))
