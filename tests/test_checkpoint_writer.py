import io
import shutil
from collections import namedtuple

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint_writer import Snapshots, Writer, best, check_space, mark_best, state_bytes
from pipeline.cli.options import to_yaml
from pipeline.errors import StorageError
from tests.commands import flat
from tests.players import CFG, MANIFEST, assert_same, snapshot, tiny_players, train_some

FORMATS = [torch.contiguous_format, torch.channels_last]


def counts_of(run):
    return [checkpoints.count_of(p) for p in checkpoints.folders(run)]


def save(writer, images_seen, state=None):
    state = state or snapshot(tiny_players())
    writer.save(state, to_yaml(CFG), MANIFEST | {"images_seen": images_seen})
    writer.wait()


@pytest.fixture
def make_writer(tmp_path):
    made = []

    def make(keep=2, milestone_images=()):
        made.append(Writer(tmp_path, keep=keep, milestone_images=list(milestone_images)))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


def test_the_writer_keeps_the_newest_and_the_milestones(tmp_path, make_writer):
    writer = make_writer(keep=2, milestone_images=[25])
    for images_seen in (10, 20, 30, 40, 50, 60):
        save(writer, images_seen)
    assert counts_of(tmp_path) == [30, 50, 60]
    assert writer.last == checkpoints.folder_of(tmp_path, 60)


def test_pruning_spares_the_one_that_is_marked_as_the_best(tmp_path, make_writer):
    writer = make_writer(keep=1)
    assert best(tmp_path) == ""
    save(writer, 10)
    mark_best(tmp_path, writer.last)
    for images_seen in (20, 30):
        save(writer, images_seen)
    assert best(tmp_path) == "images-000000010"
    assert counts_of(tmp_path) == [10, 30]
    mark_best(tmp_path, writer.last)
    save(writer, 40)
    assert counts_of(tmp_path) == [30, 40], "the best is another one now"


def test_a_garbled_mark_of_the_best_is_one_line_in_the_training_thread_and_removes_nothing(tmp_path, make_writer):
    writer = make_writer(keep=1)
    save(writer, 20)
    (tmp_path / "checkpoints" / "best.json").write_text("{")
    with pytest.raises(StorageError, match=r"^[^\n]*best\.json names no checkpoint; without that file none is marked"):
        save(writer, 30)
    assert counts_of(tmp_path) == [20, 30]


def test_the_writers_failure_reaches_the_training_thread(tmp_path, make_writer):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write the checkpoint"):
        save(make_writer(), 10)


def test_one_write_at_a_time_and_the_next_waits_for_it(tmp_path):
    inside, most = [0], [0]
    writer = Writer(tmp_path, keep=9, milestone_images=[], pause=lambda: most.append(max(most[-1], inside[0])))
    original = writer._write

    def counted(*arguments):
        inside[0] += 1
        folder = original(*arguments)
        inside[0] -= 1
        return folder

    writer._write = counted
    state = snapshot(tiny_players())
    for images_seen in (10, 20, 30):
        writer.save(state, to_yaml(CFG), MANIFEST | {"images_seen": images_seen})
    writer.close()
    assert most[-1] == 1
    assert counts_of(tmp_path) == [10, 20, 30], "closing waits for the last one"


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_snapshots_into_one_memory_equal_the_plain_ones(memory_format, precision):
    players = tiny_players(precision=precision, memory_format=memory_format)
    snapshots = Snapshots(players)
    buffers = [checkpoints.buffers_of(players)]
    assert_same(snapshots.take(buffers), checkpoints.snapshot(players, buffers))  # Adam has no moments yet
    train_some(players, 3, precision)
    buffers = [checkpoints.buffers_of(players)]
    taken, plain = snapshots.take(buffers), checkpoints.snapshot(players, buffers)
    assert_same(taken, plain)
    for key, tensor in flat(plain).items():
        if isinstance(tensor, torch.Tensor):
            assert flat(taken)[key].stride() == tensor.stride(), key
            assert flat(taken)[key].dtype == tensor.dtype, key
    train_some(players)
    assert_same(taken, plain)  # training changes it no more


def test_the_second_snapshot_takes_the_place_of_the_first():
    players = tiny_players()
    snapshots = Snapshots(players)
    train_some(players)
    first = snapshots.take([])
    weight = first["generator"]["layers.0.weight"]
    before = weight.clone()
    train_some(players)
    second = snapshots.take([])
    assert second["generator"]["layers.0.weight"].data_ptr() == weight.data_ptr()
    assert not torch.equal(weight, before)
    assert_same(second, checkpoints.snapshot(players, []))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_snapshot_saved_and_loaded_keeps_values_and_memory_format(tmp_path, make_writer, memory_format):
    players = tiny_players(memory_format=memory_format)
    train_some(players)
    snapshots = Snapshots(players)
    buffers = [checkpoints.buffers_of(players)]
    save(make_writer(), 10, snapshots.take(buffers))
    state = checkpoints.load(checkpoints.newest(tmp_path))
    expected = flat(checkpoints.snapshot(players, buffers))
    assert flat(state).keys() == expected.keys()
    for key, value in flat(state).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[key]), key
            assert value.stride() == expected[key].stride(), key
        else:
            assert value == expected[key], key
    weight = players.discriminator.layers[0].weight
    assert weight.is_contiguous(memory_format=memory_format)
    assert state["discriminator"]["layers.0.weight"].is_contiguous(memory_format=memory_format)
    other = tiny_players(seed=1, memory_format=memory_format)
    checkpoints.restore(other, state, 0, 1)
    train_some(players)
    train_some(other)
    assert_same(snapshot(other), snapshot(players))


def test_memory_that_tensors_share_is_counted_and_written_once():
    players = tiny_players()
    train_some(players)
    plain, taken = snapshot(players), Snapshots(players).take([])
    assert state_bytes(plain) == sum(
        t.untyped_storage().nbytes() for t in flat(plain).values() if isinstance(t, torch.Tensor)
    )
    buffer = io.BytesIO()
    torch.save(taken, buffer)
    assert state_bytes(taken) < buffer.tell() < 1.1 * state_bytes(taken) + 100_000


Usage = namedtuple("Usage", "total used free")


def test_a_disk_with_too_little_room_is_told_with_both_figures_before_a_write_begins(
    tmp_path, make_writer, monkeypatch
):
    writer = make_writer()
    save(writer, 10)
    large = snapshot(tiny_players()) | {"more": torch.zeros(10 << 18)}  # 10 MiB: 12 with a tenth and 1 MiB to spare
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 1 << 40, 3 << 20))
    with pytest.raises(StorageError, match=r"it takes 12 MiB with some room to spare, 3\.0 are free") as caught:
        save(writer, 20, large)
    assert caught.value.exit_code == 74
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["images-000000010"]
    assert checkpoints.newest(tmp_path).images_seen == 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, 13 << 20))
    check_space(tmp_path, large)
