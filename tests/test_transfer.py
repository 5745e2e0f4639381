"""Pinned memory used again and a stream beside the training's: in which order, on stand-ins for CUDA's parts."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from pipeline.feed import PrefetchingFeed
from pipeline.transfer import Buffer, Pending, PinnedRing, SideStream

CPU = torch.device("cpu")
DEPTH = 2


class Event:
    """Of a copy that ends when the test says so."""

    def __init__(self) -> None:
        self.recorded = 0
        self.done = threading.Event()

    def record(self) -> None:
        self.recorded += 1
        self.done.clear()

    def synchronize(self) -> None:
        assert self.recorded
        assert self.done.wait(timeout=10), "waited in vain for a copy"


def ring(depth: int = DEPTH) -> tuple[PinnedRing, list[Event]]:
    events: list[Event] = []

    def event() -> Event:
        events.append(Event())
        return events[-1]

    def allocate() -> torch.Tensor:
        return torch.zeros(3, dtype=torch.int64)

    return PinnedRing((3,), torch.int64, depth, CPU, allocate=allocate, event=event), events


def test_buffers_come_in_turn_and_the_same_ones_again():
    made, events = ring()
    taken = []
    for _ in range(3 * (DEPTH + 2)):
        buffer = made.take()
        buffer.sent()
        events[made.buffers.index(buffer)].done.set()
        taken.append(buffer)
    assert len(made.buffers) == DEPTH + 2
    assert taken == made.buffers * 3
    assert [event.recorded for event in events] == [3] * (DEPTH + 2)


def test_a_buffer_is_filled_again_only_when_the_copy_out_of_it_is_done():
    made, events = ring()
    for buffer in [made.take() for _ in range(DEPTH + 2)]:
        buffer.sent()
    again: list[Buffer] = []
    thread = threading.Thread(target=lambda: again.append(made.take()))
    thread.start()
    for event in events[1:]:
        event.done.set()
    assert not again
    assert thread.is_alive()
    events[0].done.set()
    thread.join(timeout=10)
    assert again == [made.buffers[0]]


def test_a_batch_that_was_never_sent_is_not_overwritten():
    made, _ = ring()
    for _ in range(DEPTH + 2):
        made.take()
    with pytest.raises(AssertionError, match="nobody has sent"):
        made.take()


class Side:
    """A side stream that notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self, make) -> Pending:
        batch = make()
        self.log.append(f"begin {int(batch[0])}")
        return Pending(batch, None)

    def hand_over(self, pending: Pending) -> torch.Tensor:
        self.log.append(f"hand over {int(pending.batch[0])}")
        return pending.batch


def filled(made: PinnedRing, count: int) -> Iterator[Buffer]:
    for number in range(count):
        buffer = made.take()
        buffer.tensor.fill_(number)
        yield buffer
    raise ValueError("the disk is gone")


def test_no_batch_is_overwritten_before_it_is_sent_however_the_threads_run():
    made, events = ring()
    for event in events:
        event.record = lambda event=event: (setattr(event, "recorded", event.recorded + 1), event.done.set())
    side = Side()

    def receive(buffer: Buffer) -> torch.Tensor:
        batch = buffer.tensor.clone()
        buffer.sent()
        return batch

    feed = PrefetchingFeed(filled(made, 200), DEPTH, receive, side)
    assert [feed.next().tolist() for _ in range(200)] == [[n] * 3 for n in range(200)]
    with pytest.raises(ValueError, match="the disk is gone"):
        feed.next()
    assert feed.wait_s >= 0
    feed.close()


def test_the_next_batch_is_begun_before_the_one_at_hand_is_given_where_it_is_ready():
    side = Side()
    made_all = threading.Event()

    def results() -> Iterator[int]:
        yield from range(3)
        made_all.set()
        threading.Event().wait(0)
        while True:
            yield 99

    feed = PrefetchingFeed(results(), 5, lambda n: torch.tensor([n]), side)
    assert made_all.wait(timeout=10)
    assert [int(feed.next()) for _ in range(2)] == [0, 1]
    assert side.log == ["begin 0", "begin 1", "hand over 0", "begin 2", "hand over 1"]
    feed.close()


@pytest.mark.gpu
def test_on_a_gpu_batches_from_the_side_stream_hold_what_was_sent_while_the_training_stream_is_busy():
    device = torch.device("cuda", 0)
    shape = (64, 1024)
    made = PinnedRing(shape, torch.int64, DEPTH, device)

    def results() -> Iterator[Buffer]:
        for number in range(50):
            buffer = made.take()
            buffer.tensor.fill_(number)
            yield buffer

    feed = PrefetchingFeed(results(), DEPTH, lambda buffer: buffer.to(device) * 2, SideStream(device))
    busy = torch.randn(2048, 2048, device=device)
    sums = []
    for _ in range(50):
        batch = feed.next()
        busy = busy @ busy / busy.norm()
        sums.append(batch.sum())
        del batch  # its memory may be taken at once
    assert torch.stack(sums).tolist() == [2 * n * shape[0] * shape[1] for n in range(50)]
    feed.close()
