"""Training that goes wrong without an error: NaN on one rank, infinities in fp16, one network that has won."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import checkpoint as checkpoints
from pipeline import distributed
from pipeline.cli import train as command
from pipeline.config import DistributedConfig
from pipeline.distributed import Ranks
from pipeline.step import FastStep, ReferenceStep, Step
from pipeline.watch import CollapseWatch
from tests.commands import flat, rows, status_of
from tests.numbered import record_of, recorded, words, write_numbered
from tests.players import BATCH, NZ, SIDE, assert_same, tiny_players
from tests.ranks import Launch, run_launches, run_ranks

IMAGES = 10
FOLDER = "DCGAN_TEST_FOLDER"


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return pixels, torch.randn(BATCH, NZ, generator=random)


def trained(step: Step) -> dict[str, torch.Tensor]:
    """Everything that a step changes, by name."""
    p = step.players
    parts = {
        "generator": p.generator.state_dict(),
        "discriminator": p.discriminator.state_dict(),
        "ema": p.ema,
        "optimizer_g": p.optimizer_g.state_dict()["state"],
        "optimizer_d": p.optimizer_d.state_dict()["state"],
    }
    return {k: v.clone() for k, v in flat(parts).items() if isinstance(v, torch.Tensor)}


def weights_of(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in state.items() if "running" not in k and "num_batches" not in k])


def skips_one_step_together(ranks: Ranks) -> None:
    for kind, precision in ((FastStep, "fp32"), (ReferenceStep, "fp32"), (FastStep, "bf16"), (FastStep, "fp16")):
        players = tiny_players(precision=precision)
        for scaler in (players.scaler_d, players.scaler_g):
            if scaler.is_enabled():
                scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
        for name in ("generator", "discriminator"):
            players.parallel[name] = distributed.wrap(getattr(players, name), ranks, DistributedConfig())
        step = kind(players, precision, channels_last=False, ema_half_life_images=10_000)
        states = []
        for number in range(5):
            images, latents = batch(10 * number + ranks.rank)
            bad = number == 2
            if bad and ranks.rank == 1:
                latents = latents * torch.nan
            step(images, latents, 1000 + 8 * number, 8)
            assert step.skipped.tolist() == [bad, bad], (kind, precision, number)
            assert bool(step.hopeless > 0) == (bad and precision != "fp16"), "an fp16 scale may still fall"
            states.append(trained(step))
            assert all(v.isfinite().all() for v in states[-1].values()), (kind, precision, number)
            everyones = distributed.gather(weights_of(states[-1]))
            assert torch.equal(*everyones), (kind, precision, number)
        before, after, on = states[1], states[2], states[3]
        for name, value in before.items():
            if name.startswith("ema"):  # moves towards weights that stand still
                continue
            if "running" in name:  # those of the rank whose numbers are good may learn from them
                assert ranks.rank == 0 or torch.equal(value, after[name]), (kind, precision, name)
            elif "num_batches" not in name:
                assert torch.equal(value, after[name]), (kind, precision, name)
        assert not torch.equal(weights_of(after), weights_of(on)), "training goes on"


# row 18
def test_nan_on_one_rank_skips_that_step_on_both_and_spoils_nothing():
    run_ranks(skips_one_step_together, 2)


def around(launch: int, rank: int) -> contextlib.AbstractContextManager[None]:
    return recorded(Path(os.environ[FOLDER], f"{launch}-{rank}.jsonl"))


def finite(run: Path) -> bool:
    state = checkpoints.load(checkpoints.newest(run))
    return all(v.isfinite().all() for v in flat(state).values() if isinstance(v, torch.Tensor))


def assert_one_walk(items: list[int]) -> None:
    """Epoch after epoch, each with every image once: what follows a step backwards are other images."""
    assert len(items) > IMAGES
    for start in range(0, len(items) - IMAGES + 1, IMAGES):
        assert sorted(items[start : start + IMAGES]) == list(range(IMAGES))


# row 19
def test_nan_on_one_rank_for_good_goes_back_with_other_images_each_time_and_ends_with_76(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    images = write_numbered(tmp_path / "images", IMAGES)
    settings = {
        "train__max_images": 400,
        "checkpoint__every_images": 8,
        "watch__max_skipped_steps": 2,
        "watch__max_rollbacks": 2,
    }
    launches = [
        Launch(2, words(images, tmp_path / "for good", **settings), {"DCGAN_FAULT": "nan-from:1:5"}),
        Launch(2, words(images, tmp_path / "once", **settings | {"train__max_images": 32}), {"DCGAN_FAULT": "nan:1:5"}),
    ]
    assert run_launches(launches, around) == [[76, 76], [0, 0]]
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    assert "going back 2 time(s) did not mend it (watch.max_rollbacks)" in line
    assert "Traceback" not in said

    run = tmp_path / "for good"
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["rollbacks"]) == ("failed", 76, 2)
    assert "2 steps in a row were not finite" in status["reason"]
    # NaN from the step after 20 images on: noticed two bad steps and one step of the vote later.
    events = [event["text"] for event in status["events"]]
    assert len(events) == 2
    assert "after 32 images: back to 16 images and on with other images (1 of 2 times)" in events[0]
    assert "back to 8 images and on with other images (2 of 2 times)" in events[1]
    assert finite(run)
    assert checkpoints.newest(run).images_seen <= 20

    ranks = [record_of(tmp_path / f"0-{rank}.jsonl") for rank in (0, 1)]
    assert [line["seen"] for line in ranks[0]] == [line["seen"] for line in ranks[1]]
    seen = [line["seen"] for line in ranks[0]]
    assert sum(now <= before for before, now in itertools.pairwise(seen)) == 2, "it went back twice"
    # Put end to end, all steps are one walk through the dataset: each stretch begins where the one before went wrong.
    assert_one_walk([item for lines in zip(*ranks, strict=True) for line in lines for item in line["items"]])

    run = tmp_path / "once"
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["rollbacks"]) == ("finished", 0, 0)
    assert [row["skipped_steps"] for row in rows(run / "stats.jsonl")] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert finite(run)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("divergence") / "images", IMAGES)


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Calls the command on one rank with a fault and settings; the exit code."""

    def call(fault: str = "", run: str = "run", **settings) -> int:
        monkeypatch.setenv("DCGAN_FAULT", fault)
        settings = {"train__max_images": 24, "checkpoint__every_images": 4, "checkpoint__keep": 99} | settings
        with recorded(tmp_path / f"{run}.jsonl"):
            return command.main(words(images, tmp_path / run, **settings))

    return call


def saved(run: Path) -> list[int]:
    return [checkpoints.count_of(p) for p in checkpoints.folders(run)]


def test_one_step_that_is_not_finite_is_counted_and_no_checkpoint_is_made_right_after_it(train, tmp_path, capsys):
    assert train("nan:0:2") == 0
    said = capsys.readouterr().err
    assert "no checkpoint after 12 images: the last 1 step(s) were not finite" in said
    run = tmp_path / "run"
    assert saved(run) == [4, 8, 16, 20, 24]
    found = rows(run / "stats.jsonl")
    assert [row["skipped_steps"] for row in found] == [0, 0, 1, 0, 0, 0]
    assert [row["loss_d"] is None for row in found] == [False, False, True, False, False, False]
    assert status_of(run)["skipped_steps"] == 1
    assert finite(run)
    assert "Loss/D" in tags_of(run)


def test_a_last_step_that_is_not_finite_is_saved_and_counted_all_the_same(train, tmp_path):
    assert train("nan:0:5") == 0
    assert saved(tmp_path / "run") == [4, 8, 12, 16, 20, 24]
    assert finite(tmp_path / "run")
    assert status_of(tmp_path / "run")["skipped_steps"] == 1


def test_past_the_trouble_going_back_is_counted_anew(train, tmp_path, capsys):
    """Two rows of bad steps far from each other: each may go back as often as is allowed, and the run ends well."""
    fault = ",".join(f"nan:0:{step}" for step in (2, 3, 12, 13))
    assert train(fault, train__max_images=64, watch__max_skipped_steps=2, watch__max_rollbacks=1) == 0
    said = capsys.readouterr().err
    assert said.count("and on with other images (1 of 1 times)") == 2
    run = tmp_path / "run"
    assert [event["images_seen"] for event in status_of(run)["events"]] == [8, 48]
    assert [row["images_seen"] for row in rows(run / "stats.jsonl")] == list(range(4, 65, 4)), "each stands there once"
    walk = [item for line in record_of(tmp_path / "run.jsonl") for item in line["items"]]
    assert_one_walk(walk)
    manifest = checkpoints.newest(run).manifest
    assert (manifest["images_seen"], manifest["rollbacks"], manifest["order_offset"]) == (64, 0, len(walk) - 64)


def test_going_back_may_be_forbidden_and_without_a_checkpoint_leads_to_the_beginning(train, tmp_path):
    assert train("nan-from:0:1", watch__max_skipped_steps=2, watch__max_rollbacks=0) == 76
    assert status_of(tmp_path / "run")["rollbacks"] == 0
    first_bad = {"watch__max_skipped_steps": 2, "watch__max_rollbacks": 1}
    assert train("nan-from:0:0", run="from the start", **first_bad) == 76
    (event,) = status_of(tmp_path / "from the start")["events"]
    assert "back to 0 images and on with other images" in event["text"]
    assert saved(tmp_path / "from the start") == []


def test_a_run_that_is_stopped_after_going_back_remembers_it(train, tmp_path, monkeypatch):
    settings = {"train__max_images": 48, "checkpoint__every_images": 8}
    settings |= {"watch__max_skipped_steps": 2, "watch__max_rollbacks": 1}
    fault = "nan:0:3,nan:0:4"  # after 24 images: back to 8
    assert train(fault, run="whole", **settings) == 0

    original, calls = Step.__call__, itertools.count(1)

    def stopped_in_its_eighth_step(*arguments):
        if next(calls) == 8:  # on the way back to where the trouble was
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", stopped_in_its_eighth_step)
        assert train(fault, run="stopped", **settings) == 75
    assert saved(tmp_path / "stopped") == [8, 16]
    manifest = checkpoints.newest(tmp_path / "stopped").manifest
    assert [manifest[key] for key in ("rollbacks", "order_offset", "trouble_at", "went_back_to")] == [1, 16, 24, 8]

    shutil.copytree(tmp_path / "stopped", tmp_path / "again")
    assert train("nan:0:5,nan:0:6", run="again", **settings) == 76, "it has gone back once already"
    assert train(run="stopped", **settings) == 0
    ends = [checkpoints.newest(tmp_path / run) for run in ("whole", "stopped")]
    assert [end.manifest["order_offset"] for end in ends] == [16, 16]
    assert_same(*map(checkpoints.load, ends))


# row 20
def test_fp16_infinities_are_skipped_until_the_scale_has_fallen_and_hopeless_at_its_floor():
    floor, too_high = 2.0**8, 2.0**40
    players = tiny_players(precision="fp16")
    step = FastStep(players, "fp16", channels_last=False, ema_half_life_images=0, min_loss_scale=floor)
    scalers = (players.scaler_d, players.scaler_g)
    for scaler in scalers:
        scaler.load_state_dict(scaler.state_dict() | {"scale": too_high})
    skipped = 0
    for number in range(40):
        step(*batch(number), 4 * number, BATCH)
        assert step.hopeless == 0
        assert all(scaler.get_scale() >= floor for scaler in scalers)
        skipped += int(step.skipped.max())
    assert 5 < skipped < 32, "bounded by the halvings down to the floor"
    assert step.skipped.tolist() == [0, 0], "and then it trains"
    assert all(floor < scaler.get_scale() < too_high for scaler in scalers)
    before = trained(step)

    images, latents = batch(99)
    hopeless = []
    for number in range(60):
        step(images, latents * torch.inf, 4 * number, BATCH)
        assert step.skipped.tolist() == [1, 1]
        hopeless.append(bool(step.hopeless > 0))
        assert all(scaler.get_scale() >= floor for scaler in scalers)
    assert [scaler.get_scale() for scaler in scalers] == [floor, floor]
    first = hopeless.index(True)
    assert 0 < first < 40
    assert all(hopeless[first:]), "from the floor on every one"
    assert torch.equal(weights_of(trained(step)), weights_of(before))


# row 20
def test_fp16_infinities_in_a_run_are_bounded_counted_and_end_it_when_they_never_stop(train, tmp_path):
    settings = {"precision": "fp16", "watch__max_skipped_steps": 3, "watch__max_rollbacks": 1}
    settings |= {"watch__min_loss_scale": 2.0**10, "train__max_images": 400}
    assert train("nan-from:0:2", **settings) == 76
    status = status_of(tmp_path / "run")
    assert (status["exit_code"], status["rollbacks"]) == (76, 1)
    # The scale begins at 2^16: 6 halvings at most, 3 hopeless steps, one more until the vote is read.
    steps = [line["seen"] for line in record_of(tmp_path / "run.jsonl")]
    turn = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    assert 2 + 3 < turn <= 2 + 6 + 3 + 1
    assert 3 <= len(steps) - turn <= 6 + 3 + 1
    # Rows up to the checkpoint it last went back to, and those after it.
    found = rows(tmp_path / "run/stats.jsonl")
    assert all(row["skipped_steps"] == 1 for row in found if row["images_seen"] > 8)
    assert found[-1]["images_seen"] > 8
    assert finite(tmp_path / "run")


def events_in(run: Path) -> list[tuple[int, str]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    if "Events/text_summary" not in events.Tags()["tensors"]:
        return []
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("Events/text_summary")]


def tags_of(run: Path) -> list[str]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events.Tags()["scalars"]


COLLAPSES = {
    "D has won": {"watch__min_loss_d": 100, "watch__min_diversity": 0},
    "G draws one picture": {"watch__min_loss_d": 0, "watch__min_diversity": 1},
}


# row 21
@pytest.mark.parametrize("sign", COLLAPSES)
def test_a_collapse_is_told_once_in_the_log_in_tensorboard_and_in_the_status(train, tmp_path, capsys, sign):
    assert train(watch__collapse_images=12, **COLLAPSES[sign]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collapse: ")]
    assert len(told) == 1
    assert told[0].startswith(f"collapse: {sign}")
    assert told[0].endswith("for 12 images")
    status = status_of(tmp_path / "run")
    assert [(event["images_seen"], event["text"]) for event in status["events"]] == [(12, told[0])]
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert events_in(tmp_path / "run") == [(12, told[0])]


# row 21
@pytest.mark.parametrize("sign", COLLAPSES)
def test_a_collapse_stops_the_run_with_76_where_that_is_asked_for(train, tmp_path, capsys, sign):
    assert train(watch__collapse_images=12, watch__on_collapse="stop", **COLLAPSES[sign]) == 76
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert f"collapse: {sign}" in line
    assert "watch.on_collapse" in line
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 76)
    assert f"collapse: {sign}" in status["reason"]
    assert [text for _, text in events_in(tmp_path / "run")] == [event["text"] for event in status["events"]]


# row 21
@pytest.mark.parametrize("sign", COLLAPSES)
def test_a_collapse_goes_back_with_other_images_where_that_is_asked_for(train, tmp_path, sign):
    settings = COLLAPSES[sign] | {"watch__on_collapse": "rollback", "watch__max_rollbacks": 2}
    assert train(watch__collapse_images=12, **settings) == 76
    texts = [event["text"] for event in status_of(tmp_path / "run")["events"]]
    assert all(text.startswith(f"collapse: {sign}") for text in texts)
    assert ["back to 0 images and on with other images" in text for text in texts] == [False, True, False, True, False]
    assert_one_walk([item for line in record_of(tmp_path / "run.jsonl") for item in line["items"]])


# row 21
def test_a_collapse_goes_back_to_before_it_began_though_checkpoints_were_made_since(train, tmp_path, monkeypatch):
    look = CollapseWatch.look
    monkeypatch.setattr(
        CollapseWatch,
        "look",
        lambda self, row, images: look(self, row | {"loss_d": 0.0 if row["images_seen"] > 16 else 1.0}, images),
    )
    settings = {"watch__on_collapse": "rollback", "watch__max_rollbacks": 2, "watch__min_diversity": 0}
    assert train(watch__collapse_images=12, train__max_images=400, **settings) == 76
    texts = [event["text"] for event in status_of(tmp_path / "run")["events"]]
    assert [text.split(": ")[-1] for text in texts if "back to" in text] == [
        "back to 16 images and on with other images (1 of 2 times)",
        "back to 12 images and on with other images (2 of 2 times)",
    ]
    assert "after 28 images" in status_of(tmp_path / "run")["reason"]
