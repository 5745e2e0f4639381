"""Ways from photographs to batches, each opened, drained, timed and closed by itself: for benchmarks.data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks import harness
from pipeline.cache import Kind, build_cache
from pipeline.config import DataConfig
from pipeline.decode import choose_decoder
from pipeline.feed import open_feed
from pipeline.index import Dataset
from pipeline.order import Slice

SEED = 0

Supply = contextlib.AbstractContextManager[Callable[[], object]]
"""Entered, it gives a function that makes the next batch; left, it ends its threads."""


@contextlib.contextmanager
def our_feed(
    cfg: DataConfig,
    dataset: Dataset,
    device: torch.device,
    batch: int,
    threads: int,
    cache: Kind | None,
    normalised: torch.dtype | None = None,
) -> Iterator[Callable[[], object]]:
    """Batches of the trainer's feed; with a cache, one that is built already or is now.

    Args:
        normalised: as `open_feed` takes it.
    """
    decoder = choose_decoder(cfg)[0]
    cached = cache and build_cache(cfg, dataset, decoder=decoder, kind=cache, device=device, threads=threads)
    feed = open_feed(
        cfg,
        dataset,
        seed=SEED,
        shard=Slice(batch),
        device=device,
        images_seen=0,
        threads=threads,
        decoder=decoder,
        cached=cached or None,
        normalised=normalised,
    )
    try:
        yield feed.next
    finally:
        feed.close()


@contextlib.contextmanager
def plain_dali(
    paths: Sequence[Path], size: tuple[int, int], device: torch.device, batch: int, threads: int
) -> Iterator[Callable[[], object]]:
    """Batches of the shortest DALI pipeline that does the job."""
    from nvidia.dali import fn as dali_fn
    from nvidia.dali import pipeline_def as dali_pipeline_def

    fn: Any = dali_fn  # the stubs cover neither these modules, which fill at run time, nor device_id=None
    pipeline_def: Any = dali_pipeline_def
    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=(device.index or 0) if on_gpu else None)
    def graph() -> Any:
        files, _ = fn.readers.file(files=[str(p) for p in paths], random_shuffle=True, seed=SEED)
        images = fn.decoders.image(files, device="mixed" if on_gpu else "cpu")
        images = fn.resize(images, resize_shorter=min(size))
        return fn.crop(images, crop=size)

    built = graph()
    built.build()
    yield lambda: built.run()[0].as_tensor()


@contextlib.contextmanager
def plain_pillow(paths: Sequence[Path], size: tuple[int, int], batch: int) -> Iterator[Callable[[], object]]:
    """Batches as the tutorial's Dataset makes them, as uint8 and without workers."""
    cut = transforms.Compose([transforms.Resize(min(size)), transforms.CenterCrop(size)])

    def pictures() -> Iterator[np.ndarray]:
        random = np.random.default_rng(SEED)
        while True:
            for i in random.permutation(len(paths)).tolist():
                with Image.open(paths[i]) as image:
                    yield np.asarray(cut(image.convert("RGB")))

    endless = pictures()
    yield lambda: np.stack([next(endless) for _ in range(batch)])


def timed(supply: Supply, batch: int, seconds: float, drained: int, device: torch.device) -> tuple[float, float]:
    """Open it, drain it, time it, close it.

    Args:
        drained: batches taken first: more than are ever made ahead, so that none of these is counted.

    Returns:
        Images per second and per second of processor time.
    """
    with supply as make:
        for _ in range(drained):
            make()
        harness.wait_for(device)
        batches, start, cpu_start = 0, time.perf_counter(), time.process_time()
        while not batches or time.perf_counter() - start < seconds:
            make()
            batches += 1
        harness.wait_for(device)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return batches * batch / wall, batches * batch / max(cpu, 1e-9)
