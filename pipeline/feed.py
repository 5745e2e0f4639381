"""Batches for the trainer, mostly read ahead in a thread: source -> order -> decode or cache -> augment -> device.

A batch is a function of (seed, images seen, this rank's slice, which files are bad) and of nothing else: neither
prefetch depth nor thread count nor where a run was resumed changes a byte of it.
"""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels import native
from kernels.gather import gather
from pipeline import augment
from pipeline.augment import Parameters
from pipeline.cache import Cached
from pipeline.config import DataConfig
from pipeline.decode import Decoder, Pixels, window_shape
from pipeline.decode.pillow import PillowDecoder
from pipeline.index import Dataset
from pipeline.order import Order, Slice
from pipeline.samples import Samples
from pipeline.transfer import Buffer, Pending, PinnedRing, SideStream

T = TypeVar("T")

_DRAWN_AT_ONCE = 2048
"""Images for which order and augmentation are drawn at a time."""


class Feed(Protocol):
    """An endless supply of this rank's slices of the global batches, in order."""

    wait_s: float
    """Seconds that next() has waited for data so far."""

    def next(self) -> Tensor:
        """(n, H, W, C) uint8, contiguous, on the training device, augmented.

        Where `open_feed` was told to normalise: (n, C, H, W) in [-1, 1], what kernels.normalize makes of that.

        Raises:
            DataError: no file of the dataset is good any more; every later call raises it again.
        """
        ...

    def close(self) -> None:
        """End its threads.  May be called twice."""
        ...


class ReadAhead(Generic[T]):
    """A thread that runs an iterator up to `depth` results ahead of its consumer.

    Its error comes out of next() after the results before it, and again from every later next().
    """

    def __init__(self, results: Iterator[T], depth: int, close: Callable[[], None]) -> None:
        self._results = results
        self._depth = depth
        self._close = close
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for result in self._results:
                with self._changed:
                    self._ready.append(result)
                    self._changed.notify_all()
                    # The result being made counts too: never more than depth in memory.
                    self._changed.wait_for(lambda: self._stop or len(self._ready) < self._depth)
                    if self._stop:
                        return
            raise RuntimeError("there are no more batches")  # ended in silence, it would leave next() waiting for ever
        except BaseException as error:  # noqa: BLE001  handed over: next() raises it in the consumer's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._close()

    def next(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._stop)
            if self._stop:
                raise RuntimeError("the feed is closed")
            if self._ready:
                result = self._ready.popleft()
                self._changed.notify_all()
                return result
            assert self._error
            raise self._error

    def poll(self) -> T | None:
        """The next result where it is there already; an error waits for next()."""
        with self._changed:
            if not self._ready or self._stop:
                return None
            result = self._ready.popleft()
            self._changed.notify_all()
            return result

    def close(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()


class BackgroundFeed(Generic[T]):
    """Batches of which the most is made by a background thread, and the rest by `receive` in the trainer's."""

    def __init__(
        self, results: Iterator[T], depth: int, receive: Callable[[T], Tensor], close: Callable[[], None] = lambda: None
    ) -> None:
        self.wait_s = 0.0
        self._receive = receive
        self._ahead = ReadAhead(results, depth, close)

    def next(self) -> Tensor:
        start = time.perf_counter()
        batch = self._receive(self._ahead.next())
        self.wait_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self._ahead.close()


class DirectFeed:
    """Batches that are made when they are asked for, in the training's thread, on all of its cores.

    For what takes a fraction of a millisecond, but for an epoch's permutation (36 ms for 200,000 images): while another
    thread made some of it, this one waited for the interpreter's lock.
    """

    def __init__(self, wanted: Iterator[Batch], make: Callable[[Batch], Tensor]) -> None:
        self.wait_s = 0.0
        self._wanted, self._make = wanted, make
        self._closed = False

    def next(self) -> Tensor:
        if self._closed:
            raise RuntimeError("the feed is closed")
        start = time.perf_counter()
        batch = self._make(next(self._wanted))
        self.wait_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self._closed = True


class PrefetchingFeed(BackgroundFeed[T]):
    """A feed for a GPU whose `receive` runs on a stream of its own, a batch ahead of the step where one is ready."""

    def __init__(
        self,
        results: Iterator[T],
        depth: int,
        receive: Callable[[T], Tensor],
        side: SideStream,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(results, depth, receive, close)
        self._side = side
        self._pending: Pending | None = None

    def _begin(self, result: T) -> Pending:
        return self._side.begin(lambda: self._receive(result))

    def next(self) -> Tensor:
        pending = self._pending
        if pending is None:
            start = time.perf_counter()
            result = self._ahead.next()
            self.wait_s += time.perf_counter() - start
            pending = self._begin(result)
        following = self._ahead.poll()
        self._pending = None if following is None else self._begin(following)
        return self._side.hand_over(pending)

    def close(self) -> None:
        super().close()
        self._pending = None


class Batch(NamedTuple):
    """What a batch shall be, before any pixel is touched."""

    items: np.ndarray
    """(n,) int64: rows of the dataset."""
    parameters: Parameters


def batches(cfg: DataConfig, order: Order, shard: Slice, images_seen: int) -> Iterator[Batch]:
    """This rank's part of every step from images_seen on, without end.

    Those of some steps are drawn at once: it is a hundred short NumPy operations however many images they are for.
    """
    per_rank = shard.per_rank
    steps = max(1, _DRAWN_AT_ONCE // per_rank)
    while True:
        numbers = np.concatenate([shard.numbers(images_seen + i * shard.batch_size) for i in range(steps)])
        items, parameters = order.items(numbers), augment.parameters(cfg, order.seed, numbers)
        for mine in (slice(first, first + per_rank) for first in range(0, len(numbers), per_rank)):
            yield Batch(items[mine], parameters.of(mine))
        images_seen += steps * shard.batch_size


def _decoded_by_pillow(cfg: DataConfig, decoder: PillowDecoder, wanted: Iterator[Batch]) -> Iterator[Tensor]:
    wanted, ahead = itertools.tee(wanted)  # the decoder asks for the next batch before it gives this one
    for batch, windows in zip(wanted, decoder.windows(b.items for b in ahead), strict=True):
        yield torch.from_numpy(augment.apply_numpy(windows, batch.parameters, cfg.size))


def _gathered(cfg: DataConfig, images: Pixels, wanted: Iterator[Batch]) -> Iterator[Tensor]:
    for batch in wanted:
        yield torch.from_numpy(augment.take_numpy(images, batch.items, batch.parameters, cfg.size))


def _copied(results: Iterator[Tensor], ring: PinnedRing) -> Iterator[Buffer]:
    """In memory from which the GPU copies by itself, so that the host need not wait."""
    for result in results:
        buffer = ring.take()
        buffer.tensor.copy_(result)
        yield buffer


def _gathered_into(cfg: DataConfig, images: Pixels, wanted: Iterator[Batch], ring: PinnedRing) -> Iterator[Buffer]:
    for batch in wanted:
        buffer = ring.take()
        augment.take_numpy(images, batch.items, batch.parameters, cfg.size, out=buffer.tensor.numpy())
        yield buffer


def _placed(wanted: Iterator[Batch], ring: PinnedRing) -> Iterator[tuple[Buffer, Parameters]]:
    """What a GPU needs to gather each batch itself."""
    for batch in wanted:
        buffer = ring.take()
        augment.pack_places(batch.items, batch.parameters, buffer.tensor.numpy())
        yield buffer, batch.parameters


def can_normalise(cfg: DataConfig, device: torch.device, *, cache: str, channels_last: bool) -> bool:
    """Whether a feed can give normalised batches: decoded images lie where training is, on a GPU or in the memory of a
    CPU for which the C kernels are loaded, and nothing is done to their colours."""
    recoloured = cfg.brightness or cfg.contrast or cfg.saturation or cfg.hue
    at_hand = cache == "device" if device.type == "cuda" else cache != "none" and native.loaded()
    return at_hand and channels_last and not recoloured


def _gatherer(
    source: Tensor, cfg: DataConfig, normalised: torch.dtype | None
) -> Callable[[tuple[Buffer, Parameters]], Tensor]:
    """Makes a batch of images that lie on a GPU, out of what `_placed` gives."""

    def make(placed: tuple[Buffer, Parameters]) -> Tensor:
        buffer, params = placed
        places = augment.unpack_places(buffer.to(source.device), params)
        if normalised is None:
            return augment.take_device(source, places.rows, params, cfg.size, places)
        return gather(
            source, places.rows, normalised, flip=places.flip, top=places.top, left=places.left, size=cfg.size
        )

    return make


def as_tensor(images: Pixels) -> Tensor:
    """The same memory, which nobody may write to where it is a map of a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images)


def gatherer_on_cpu(images: Tensor, cfg: DataConfig, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Makes a batch on all cores: 0.17 ms for 128 mirrored images of 64 x 64 (2 cores, kernels.jsonl, f49ebfc)."""

    def there(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(values)

    def make(batch: Batch) -> Tensor:
        flip, top, left = (there(p) for p in (batch.parameters.flip, batch.parameters.top, batch.parameters.left))
        return gather(images, torch.from_numpy(batch.items), dtype, flip=flip, top=top, left=left, size=cfg.size)

    return make


def open_feed(
    cfg: DataConfig,
    dataset: Dataset,
    *,
    seed: int,
    shard: Slice,
    device: torch.device,
    images_seen: int,
    threads: int,
    decoder: Decoder,
    cached: Cached | None,
    samples: Samples | None = None,
    normalised: torch.dtype | None = None,
) -> Feed:
    """A feed whose first batch is that of the step after images_seen images.

    Args:
        device: where batches are wanted; with DALI, a GPU also decodes.
        threads: decode threads, at least 1.
        cached: all images decoded; None: decode anew each time.
        samples: reads the dataset's files and lists those that proved bad; None: nobody asks for them.
        normalised: give batches of this dtype in [-1, 1], made by one kernel; where `can_normalise` says so.
    """
    assert samples is None or samples.dataset is dataset
    samples = samples or Samples(dataset)
    wanted = batches(cfg, Order(seed, len(dataset)), shard, images_seen)
    on_gpu = device.type == "cuda"

    def same(batch: Tensor) -> Tensor:
        return batch

    def send(buffer: Buffer) -> Tensor:
        return buffer.to(device)

    def ring() -> PinnedRing:
        return PinnedRing((shard.per_rank, *cfg.size, cfg.nc), torch.uint8, cfg.prefetch, device)

    if cached is not None:
        assert cached.images.shape == (len(dataset), *window_shape(cfg)), cached.images.shape
        if isinstance(cached.images, Tensor) and on_gpu:
            places = PinnedRing((augment.NUM_PLACES, shard.per_rank), torch.int64, cfg.prefetch, device)
            make = _gatherer(cached.images, cfg, normalised)
            return PrefetchingFeed(_placed(wanted, places), cfg.prefetch, make, SideStream(device))
        pixels = cached.images.numpy() if isinstance(cached.images, Tensor) else cached.images
        if normalised is not None:
            assert not on_gpu
            return DirectFeed(wanted, gatherer_on_cpu(as_tensor(pixels), cfg, normalised))
        if on_gpu:
            filled = _gathered_into(cfg, pixels, wanted, ring())
            return PrefetchingFeed(filled, cfg.prefetch, send, SideStream(device))
        return BackgroundFeed(_gathered(cfg, pixels, wanted), cfg.prefetch, same)
    assert normalised is None

    if decoder == "dali":
        from pipeline.decode.dali import DaliDecoder, GpuHandOver

        dali = DaliDecoder(cfg, samples, device=device, threads=threads, max_batch=shard.per_rank)
        # DALI itself works cfg.prefetch batches ahead; one more waits here.
        return BackgroundFeed(dali.images(wanted), 1, GpuHandOver() if on_gpu else torch.from_dlpack, dali.close)

    height, width, channels = window_shape(cfg)
    pillow = PillowDecoder(samples, (height, width), channels, threads)
    decoded = _decoded_by_pillow(cfg, pillow, wanted)
    if on_gpu:
        return PrefetchingFeed(_copied(decoded, ring()), cfg.prefetch, send, SideStream(device), pillow.close)
    return BackgroundFeed(decoded, cfg.prefetch, same, pillow.close)
