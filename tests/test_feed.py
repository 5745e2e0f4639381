import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kernels.normalize import normalize
from pipeline import augment
from pipeline.cache import build_cache
from pipeline.config import DataConfig
from pipeline.decode import dali_problem, window_shape
from pipeline.decode.pillow import decode
from pipeline.errors import DataError
from pipeline.feed import Feed, ReadAhead, open_feed
from pipeline.index import Dataset, open_dataset
from pipeline.order import Order, Slice
from tests.images import jpeg_bytes, portrait
from tests.numerics import load_native

CPU = torch.device("cpu")
COUNT = 37
SEED = 11
needs_dali = pytest.mark.skipif(bool(dali_problem()), reason=f"DALI cannot be imported: {dali_problem()}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KINDS = ["pillow", pytest.param("dali", marks=needs_dali), "host", "device"]
SETTINGS: dict[str, Any] = {"image_size": 16, "crop_margin": 3, "flip": True, "contrast": 0.3, "hue": 15.0}


def in_time(work: Callable[[], Any]) -> Any:
    """The result of work, or TimeoutError: a feed that hangs shall fail its test, not stop the suite."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=30)
    finally:
        pool.shutdown(wait=False)


class Bench:
    """Opens feeds over one small dataset."""

    def __init__(self, folder: Path, cache: Path) -> None:
        for number in range(COUNT):
            scene = portrait(20 + number % 9, 20 + number % 7) ^ np.uint8(number)
            (folder / f"{number:02}.jpg").write_bytes(jpeg_bytes(Image.fromarray(scene)))
        self.places: dict[str, Any] = {"dataroot": str(folder), "cache_dir": str(cache)}
        self.dataset = open_dataset(DataConfig(**self.places))

    def open(
        self,
        kind: str,
        shard: Slice | None = None,
        images_seen: int = 0,
        threads: int = 2,
        device: torch.device = CPU,
        dataset: Dataset | None = None,
        normalised: torch.dtype | None = None,
        **settings: Any,
    ) -> "closing[Feed]":
        decoder: Any = "dali" if kind == "dali" else "pillow"
        cfg = DataConfig(decoder=decoder, **(self.places | SETTINGS | settings))
        cached = None
        if kind in ("host", "device"):
            cached = build_cache(cfg, self.dataset, decoder=decoder, kind=kind, device=device, threads=2)  # type: ignore[arg-type]
        return closing(
            open_feed(
                cfg,
                dataset or self.dataset,
                seed=SEED,
                shard=shard or Slice(8),
                device=device,
                images_seen=images_seen,
                threads=threads,
                decoder=decoder,
                cached=cached,
                normalised=normalised,
            )
        )

    def take(self, kind: str, count: int, **options: Any) -> list[Tensor]:
        with self.open(kind, **options) as feed:
            return [in_time(feed.next) for _ in range(count)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("read-", "pillow"))]
    assert not left


@pytest.mark.parametrize("kind", ["pillow", "host", "device"])
def test_a_batch_is_order_decoder_and_augmentation_in_a_row(bench: Bench, kind: str) -> None:
    cfg = DataConfig(**(bench.places | SETTINGS))
    batches = bench.take(kind, 6, images_seen=16)
    numbers = np.arange(16, 16 + 48)
    rows = []
    for item in Order(SEED, COUNT).items(numbers).tolist():
        window = decode(bench.dataset.read(item), bench.dataset.size(item), window_shape(cfg)[:2], 3, "")
        rows.append(torch.from_numpy(window.copy()))
    expected = augment.apply(torch.stack(rows), augment.parameters(cfg, SEED, numbers), (16, 16))
    assert torch.equal(torch.cat(batches), expected)
    for batch in batches:
        assert batch.dtype == torch.uint8
        assert batch.shape == (8, 16, 16, 3)
        assert batch.is_contiguous()


@needs_dali
def test_dali_gives_the_same_batches_within_the_tolerance_of_the_decoders(bench: Bench) -> None:
    ours, theirs = (torch.cat(bench.take(kind, 10)).float() for kind in ("pillow", "dali"))
    by_image = (ours - theirs).abs().mean((1, 2, 3))
    assert by_image.mean() < 0.25
    assert by_image.max() < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_threads_prefetch_and_resuming_change_no_byte(bench: Bench, kind: str) -> None:
    run = bench.take(kind, 9)
    others = bench.take(kind, 9, threads=1, prefetch=1)
    resumed = bench.take(kind, 3, images_seen=48, threads=3, prefetch=5)
    assert torch.equal(torch.cat(run), torch.cat(others))
    assert torch.equal(torch.cat(run[6:]), torch.cat(resumed))


def test_how_many_images_are_drawn_at_once_changes_no_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    many = bench.take("host", 12, shard=Slice(8, rank=1, world_size=2), images_seen=COUNT - 5)
    monkeypatch.setattr("pipeline.feed._DRAWN_AT_ONCE", 1)  # a batch at a time
    one = bench.take("host", 12, shard=Slice(8, rank=1, world_size=2), images_seen=COUNT - 5)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_see_what_one_rank_sees(bench: Bench, kind: str) -> None:
    one = torch.stack(bench.take(kind, 6))
    for world_size in (2, 4):
        ranks = [bench.take(kind, 6, shard=Slice(8, rank, world_size)) for rank in range(world_size)]
        assert torch.equal(torch.cat([torch.stack(batches) for batches in ranks], dim=1), one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_dataset_walks_it_several_times(bench: Bench, kind: str) -> None:
    plain = {"flip": False, "crop_margin": 0, "contrast": 0.0, "hue": 0.0}
    (batch,) = bench.take(kind, 1, shard=Slice(2 * COUNT), **plain)
    order = Order(SEED, COUNT).items(np.arange(2 * COUNT)).tolist()
    for item in range(COUNT):
        first, second = (i for i, other in enumerate(order) if other == item)
        assert torch.equal(batch[first], batch[second])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_kept_does_not_change_while_others_come_or_when_the_feed_ends(bench: Bench, kind: str) -> None:
    with bench.open(kind, prefetch=1) as feed:
        kept = in_time(feed.next)
        copy = kept.clone()
        for _ in range(5):
            in_time(feed.next)
            assert torch.equal(kept, copy)
    assert torch.equal(kept, copy)


@pytest.mark.parametrize("kind", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_a_file_damaged_after_indexing_changes_its_own_row_and_no_other(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = torch.cat(bench.take(kind, 4, prefetch=2))
    bad = int(Order(SEED, COUNT).items(np.arange(20, 21))[0])
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, i: read(self, i)[: 200 if i == bad else None])
    found = torch.cat(bench.take(kind, 4, prefetch=2))
    assert [row for row in range(32) if not torch.equal(found[row], healthy[row])] == [20]


@pytest.mark.parametrize("kind", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_a_disk_that_dies_hands_its_error_over_again_and_again(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def read(self: Dataset, image: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise DataError(f"{self.key(image)}: cannot be read (Input/output error)")
        return healthy(self, image)

    healthy = Dataset.read
    monkeypatch.setattr(Dataset, "read", read)
    with bench.open(kind) as feed:
        for count in (4, 1):
            with pytest.raises(DataError, match=rf"none of the {COUNT} images .*Input/output error"):
                in_time(lambda: [feed.next() for _ in range(count)])  # noqa: B023  called at once


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_may_be_closed_twice_and_gives_nothing_afterwards(bench: Bench, kind: str) -> None:
    with bench.open(kind) as feed:
        in_time(feed.next)
        feed.close()
        with pytest.raises(RuntimeError, match="closed"):
            in_time(feed.next)


def test_the_time_spent_waiting_is_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Dataset.read

    def slow(self: Dataset, image: int) -> np.ndarray:
        time.sleep(0.005)
        return read(self, image)

    monkeypatch.setattr(Dataset, "read", slow)
    with bench.open("pillow", threads=1) as feed:
        in_time(feed.next)
        assert feed.wait_s > 0.03


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_ahead_is_bounded(depth: int) -> None:
    begun = 0
    more = threading.Semaphore(0)

    def results() -> Iterator[int]:
        nonlocal begun
        while True:
            begun += 1
            more.release()
            yield begun

    ahead = ReadAhead(results(), depth, lambda: None)
    for _ in range(depth):
        assert more.acquire(timeout=10)
    assert begun == depth
    for taken in range(1, 6):
        assert in_time(ahead.next) == taken
        assert more.acquire(timeout=10)  # one taken, one more begun
        assert begun == depth + taken
    ahead.close()


def test_results_that_end_are_an_error_and_no_hang() -> None:
    ahead = ReadAhead(iter([1]), 2, lambda: None)
    assert in_time(ahead.next) == 1
    with pytest.raises(RuntimeError, match="no more batches"):
        in_time(ahead.next)
    ahead.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_batches_lie_on_it_and_the_host_never_waits(bench: Bench, kind: str) -> None:
    gpu = torch.device("cuda", 0)
    expected = bench.take(kind, 8)
    with bench.open(kind, device=gpu, prefetch=2) as feed:
        batches = [in_time(feed.next)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches += [feed.next() for _ in range(7)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for batch, other in zip(batches, expected, strict=True):
        assert batch.device == gpu
        difference = (batch.cpu().float() - other.float()).abs().mean((1, 2, 3))
        assert difference.max() <= (1.0 if kind == "dali" else 0.0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"flip": True}, {"flip": True, "crop_margin": 3}])
def test_on_a_gpu_one_kernel_gives_what_normalising_the_batch_would(bench: Bench, settings: dict[str, Any]) -> None:
    gpu = torch.device("cuda", 0)
    plain = {"crop_margin": 0, "flip": False, "contrast": 0.0, "hue": 0.0} | settings
    expected = bench.take("device", 8, device=gpu, **plain)
    for dtype in (torch.float32, torch.bfloat16):
        batches = bench.take("device", 8, device=gpu, normalised=dtype, **plain)
        for batch, images in zip(batches, expected, strict=True):
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.cpu(), normalize(images.cpu(), dtype))


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("settings", [{}, {"flip": True}, {"flip": True, "crop_margin": 3}])
def test_on_a_cpu_the_c_kernel_gives_what_normalising_the_batch_would(
    bench: Bench, kind: str, settings: dict[str, Any]
) -> None:
    load_native()
    plain = {"crop_margin": 0, "flip": False, "contrast": 0.0, "hue": 0.0} | settings
    expected = bench.take(kind, 8, **plain)
    for dtype in (torch.float32, torch.bfloat16):
        for batch, images in zip(bench.take(kind, 8, normalised=dtype, **plain), expected, strict=True):
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch, normalize(images, dtype))
    with bench.open(kind, normalised=torch.bfloat16, **plain) as feed:
        feed.next()
        assert feed.wait_s > 0
        feed.close()
        with pytest.raises(RuntimeError, match="the feed is closed"):
            feed.next()
