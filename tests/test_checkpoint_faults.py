"""Checkpoints that a kill, a bad disk, another machine or an enemy has had a hand in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline import distributed
from pipeline.checkpoint_writer import Writer
from pipeline.cli import train as command
from pipeline.cli.options import to_yaml
from pipeline.distributed import Ranks
from pipeline.errors import StorageError
from tests.numbered import words, write_numbered
from tests.players import CFG, MANIFEST, assert_same, snapshot, tiny_players, train_some, write
from tests.ranks import run_ranks


class Killed(BaseException):
    """Ends what it is raised in as SIGKILL does: no handler of ours catches it."""


class Executioner:
    """Counts the calls by which a write reaches the disk, and kills before the one of a given number."""

    CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.at: int | None = None
        for name in self.CALLS:
            original = getattr(os, name)
            monkeypatch.setattr(os, name, functools.partial(self._call, name, original))
        self._open = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode="r", *a, **k: self._opened(path, mode, *a, **k))

    def _call(self, name: str, original, *arguments, **keys):
        self._pass(name)
        return original(*arguments, **keys)

    def _pass(self, name: str) -> None:
        if self.at is not None:
            self.calls.append(name)
            if len(self.calls) == self.at:
                raise Killed

    def _opened(self, path: Path, mode: str, *arguments, **keys):
        file = self._open(path, mode, *arguments, **keys)
        if "w" in mode and self.at is not None:
            write = file.write

            def half_then_whole(data):
                written = write(memoryview(data)[: len(data) // 2])
                file.flush()
                self._pass("write")
                return written + write(memoryview(data)[written:])

            try:
                self._pass("open")
            except Killed:
                file.close()  # as the system does
                raise
            return Handle(file, half_then_whole)
        return file


class Handle:
    """A file whose write() is ours."""

    def __init__(self, file, write) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


# row 10
def test_killed_at_any_stage_of_a_write_the_checkpoint_before_loads_and_the_next_write_succeeds(tmp_path, monkeypatch):
    """From the first folder to the last old file that is removed; with and without a damaged one in the way."""
    executioner = Executioner(monkeypatch)
    before, after = tiny_players(), tiny_players()
    train_some(after)
    states = {10: snapshot(before), 20: snapshot(after), 30: snapshot(after)}

    def begin(run: Path, images_seen: int) -> None:
        writer = Writer(run, keep=1, milestone_images=[])
        try:
            writer.save(states[images_seen], to_yaml(CFG), MANIFEST | {"images_seen": images_seen})
            writer.wait()
        finally:
            writer.close()

    for in_the_way in (False, True):
        whole, survived = 0, False
        while not survived:
            whole += 1
            run = tmp_path / f"{in_the_way}-{whole}"
            write(run, before, 10)
            if in_the_way:
                (write(run, after, 20) / "config.yaml").write_text("damaged")
            executioner.calls, executioner.at = [], whole
            try:
                begin(run, 20)
                survived = True
            except Killed:
                pass
            calls, executioner.at = executioner.calls, None

            found = checkpoints.newest(run, lambda _: None)
            assert found.images_seen in (10, 20), calls
            assert_same(checkpoints.load(found), states[found.images_seen])
            checkpoints.clear_leftovers(run)  # as the next start does
            assert not [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")], calls
            begin(run, 30)
            assert_same(checkpoints.load(checkpoints.newest(run)), states[30])
            assert [p.name for p in (run / "checkpoints").iterdir()] == ["images-000000030"], calls
        # Three files opened, half and wholly written and synced; their folder; the renaming; what is removed.
        assert {"open", "write", *Executioner.CALLS} == set(calls)
        assert len(calls) >= 3 * 3 + 4 + 5


def test_leftovers_of_a_killed_process_are_cleared_and_nothing_else(tmp_path):
    folder = write(tmp_path, tiny_players(), 10)
    for name in (".images-000000020.partial", ".images-000000005.removed", "images-000000030.abandoned"):
        shutil.copytree(folder, folder.with_name(name))
    checkpoints.clear_leftovers(tmp_path)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["images-000000010", "images-000000030.abandoned"]
    checkpoints.clear_leftovers(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints after 4 and after 8 images, and its images."""
    folder = tmp_path_factory.mktemp("finished")
    images = write_numbered(folder / "images", 6)
    settings = {"train__max_images": 8, "checkpoint__every_images": 4}
    assert command.main(words(images, folder / "run", **settings)) == 0
    return folder


@pytest.fixture
def again(finished, tmp_path, capsys):
    """Calls the command on a copy of that run, with these settings; gives exit code and what was said."""
    shutil.copytree(finished / "run", tmp_path / "run")

    def train(**settings) -> tuple[int, str]:
        capsys.readouterr()
        code = command.main(words(finished / "images", tmp_path / "run", train__max_images=12, **settings))
        return code, capsys.readouterr().err

    return train


def names_in(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# rows 11, 12 and 13
@pytest.mark.parametrize(
    ("damage", "name"),
    [(cut_short, "config.yaml"), (flip_a_bit, "manifest.json"), (Path.unlink, "state.pt")],
    ids=["config.yaml cut short", "a bit of manifest.json flipped", "state.pt missing"],
)
def test_a_damaged_newest_checkpoint_is_told_and_the_command_goes_on_from_the_one_before(again, tmp_path, damage, name):
    damage(tmp_path / "run/checkpoints/images-000000008" / name)
    code, said = again()
    assert code == 0
    assert said.count("passing over a checkpoint: ") == 1
    assert f"images-000000008/{name}" in said
    assert "resuming after 4 images" in said
    assert names_in(tmp_path / "run") == ["images-000000004", "images-000000008.abandoned", "images-000000012"]


def digest(state: checkpoints.State) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def loads_what_rank_0_chose(ranks: Ranks, folder: Path) -> None:
    """Every rank has a disk of its own here; only rank 0 looks for the newest checkpoint, as in a run."""

    def choose_and_load(disks: str) -> tuple[int, str]:
        disk = folder / disks / f"rank-{ranks.rank}"

        def mine() -> checkpoints.State:
            return checkpoints.load(dataclasses.replace(found, folder=disk / "checkpoints" / found.folder.name))

        newest = checkpoints.newest(disk, lambda _: None) if ranks.leads else None
        found = distributed.broadcast(newest)
        state = distributed.together(mine)
        return found.images_seen, digest(state)

    seen = distributed.gather(choose_and_load("equal"))
    assert seen[0] == seen[1], "one step and one hash"
    assert seen[0][0] == 20
    for disks, message in {
        "other weights on rank 1": "state.pt is not the file of the manifest",
        "older on rank 1": "cannot read the checkpoint",
        "damaged on rank 1": "state.pt is not the file of the manifest",
    }.items():
        with pytest.raises(StorageError, match=message) as caught:
            choose_and_load(disks)
        assert caught.value.shared
        assert distributed.gather(str(caught.value)) == [str(caught.value)] * ranks.world_size
    # Rank 0's newest is damaged: it walks back, and all follow it.
    seen = distributed.gather(choose_and_load("damaged on rank 0"))
    assert seen[0] == seen[1]
    assert seen[0][0] == 10


# row 14
def test_ranks_that_see_different_checkpoints_all_refuse_and_those_that_see_the_same_load_one(tmp_path):
    players, others = tiny_players(), tiny_players(seed=1)
    for disks in ("equal", "other weights on rank 1", "older on rank 1", "damaged on rank 1", "damaged on rank 0"):
        for rank in (0, 1):
            disk = tmp_path / disks / f"rank-{rank}"
            write(disk, players, 10)
            if (disks, rank) == ("older on rank 1", 1):
                continue
            newest = write(disk, others if (disks, rank) == ("other weights on rank 1", 1) else players, 20)
            if disks == f"damaged on rank {rank}":
                flip_a_bit(newest / "state.pt")
    run_ranks(loads_what_rank_0_chose, 2, tmp_path)


class Marker:
    """Pickles into a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# row 15
def test_a_malicious_pickle_with_a_right_manifest_ends_the_command_with_74_and_runs_nothing(again, tmp_path):
    folder = tmp_path / "run/checkpoints/images-000000008"
    manifest = checkpoints.verify(folder).manifest
    marker = tmp_path / "ran"
    state = {"generator": Marker(marker), "meters": Marker(marker)}
    del manifest["format"], manifest["files"]
    checkpoints.write(tmp_path / "run", state, (folder / "config.yaml").read_text(), manifest)
    checkpoints.verify(folder)
    torch.load(folder / "state.pt", weights_only=False)["generator"].close()
    assert marker.exists(), "it would run"
    marker.unlink()

    code, said = again()
    assert code == 74
    assert [line for line in said.splitlines() if "error" in line] == [said.splitlines()[-1]]
    assert "Traceback" not in said
    assert f"{folder / 'state.pt'} holds no state that may be read" in said.splitlines()[-1]
    assert not marker.exists()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert names_in(tmp_path / "run") == ["images-000000004", "images-000000008"]


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_for_a_checkpoint_ends_the_command_with_74_and_keeps_the_old_one(
    again, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 1 << 40, 1 << 19))
    code, said = again(checkpoint__keep=1)
    assert code == 74
    assert "it takes 1 MiB with some room to spare, 0.5 are free" in said.splitlines()[-1]
    assert names_in(tmp_path / "run") == ["images-000000004", "images-000000008"]
    assert checkpoints.newest(tmp_path / "run").images_seen == 8
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert "some room to spare" in status["reason"]
    monkeypatch.undo()
    assert again()[0] == 0
