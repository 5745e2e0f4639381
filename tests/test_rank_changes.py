"""A run that goes on with another number of ranks, by the real command: the same images at every step."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import pytest

from tests.numbered import record_of, recorded, words, write_numbered
from tests.ranks import Launch, run_launches

IMAGES, BATCH, HALF, WHOLE = 10, 8, 24, 48
CHANGES = [(2, 1), (1, 2), (2, 4)]
FOLDER = "DCGAN_TEST_FOLDER"


def around(launch: int, rank: int) -> contextlib.AbstractContextManager[None]:
    return recorded(Path(os.environ[FOLDER], f"{launch}-{rank}.jsonl"))


def steps_of(folder: Path, launch: int, world_size: int) -> dict[int, tuple[list[int], list[float]]]:
    """Images seen before each step of a launch, to the items and latents of its global batch in rank order."""
    ranks = [record_of(folder / f"{launch}-{rank}.jsonl") for rank in range(world_size)]
    found = {}
    for lines in zip(*ranks, strict=True):
        assert len({line["seen"] for line in lines}) == 1
        items, latents = ([value for line in lines for value in line[key]] for key in ("items", "latents"))
        found[lines[0]["seen"]] = items, latents
    return found


# row 26
def test_two_ranks_to_one_one_to_two_and_two_to_four_see_the_same_images_at_every_step(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    settings = functools.partial(words, write_numbered(tmp_path / "images", IMAGES), train__batch_size=BATCH)
    launches = [Launch(1, settings(tmp_path / "whole", train__max_images=WHOLE))]
    for before, after in CHANGES:
        run = tmp_path / f"{before}-to-{after}"
        launches += [Launch(before, settings(run, train__max_images=HALF))]
        launches += [Launch(after, settings(run, train__max_images=WHOLE))]
    assert run_launches(launches, around) == [[0] * launch.world_size for launch in launches]

    whole = steps_of(tmp_path, 0, 1)
    assert list(whole) == list(range(0, WHOLE, BATCH))
    walk = [item for items, _ in whole.values() for item in items]
    assert sorted(walk[:IMAGES]) == sorted(walk[IMAGES : 2 * IMAGES]) == list(range(IMAGES))
    assert walk[:IMAGES] != walk[IMAGES : 2 * IMAGES]
    for number, (before, after) in enumerate(CHANGES):
        first = steps_of(tmp_path, 1 + 2 * number, before)
        second = steps_of(tmp_path, 2 + 2 * number, after)
        assert list(first) == list(range(0, HALF, BATCH))
        assert list(second) == list(range(HALF, WHOLE, BATCH)), "it goes on, and does not begin anew"
        for seen, (items, latents) in (first | second).items():
            assert items == whole[seen][0], (before, after, seen)
            assert latents == pytest.approx(whole[seen][1]), (before, after, seen)
    said = capfd.readouterr().err
    for before, after in CHANGES:
        assert f"the layout differs (world_size {before} -> {after})" in said
