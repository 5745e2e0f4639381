"""Which of a run's evaluations is the best, when it is enough, and how both are told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint_writer import mark_best
from pipeline.config import Config, EvalConfig, TrainConfig
from pipeline.evaluating import Standing, due_at, in_words, keep_best, plan_in_words, standing_of
from pipeline.loop import Maintenance

BY_SWD = EvalConfig(every_images=8, num_images=8)


def line(images_seen: int, swd: float | None, num_images: int = 8) -> dict[str, Any]:
    return {"images_seen": images_seen, "num_images": num_images, "seconds": 1.0, "swd": swd}


def stand(values: list[float | None], saved: tuple[int, ...] = (8, 16, 24, 32), cfg: EvalConfig = BY_SWD):
    """Images seen of the best, and the evaluations since."""
    found = standing_of([line(8 * (i + 1), v) for i, v in enumerate(values)], cfg, set(saved))
    return found.best and found.best["images_seen"], found.since


@pytest.mark.parametrize(
    ("values", "best", "since"),
    [
        ([], None, 0),
        ([5.0], 8, 0),
        ([5.0, 3.0, 4.0], 16, 1),
        ([5.0, 5.0], 8, 1),  # as good is not better
        ([5.0, math.nan, 4.0], 24, 0),
        ([None, None], None, 2),
        ([math.inf, 9.0], 16, 0),
    ],
)
def test_the_best_is_the_first_of_the_lowest_and_those_since_are_counted(values, best, since):
    assert stand(values) == (best, since)


def test_some_metrics_are_better_when_higher():
    rows = [line(8, None) | {"recall": 0.2}, line(16, None) | {"recall": 0.4}, line(24, None) | {"recall": 0.3}]
    cfg = EvalConfig(every_images=8, num_images=8, metrics=["recall"], best="recall")
    found = standing_of(rows, cfg, {8, 16, 24})
    assert found.best is rows[1]
    assert found.since == 1


def test_one_whose_checkpoint_is_gone_is_not_the_best_though_its_figure_is():
    assert stand([5.0, 3.0, 4.0], saved=(8, 24)) == (24, 0)
    assert stand([5.0, 3.0, 4.0], saved=(8,)) == (8, 2)
    assert stand([5.0, 3.0], saved=()) == (None, 2)


def test_figures_of_another_number_of_images_or_without_the_metric_count_for_nothing():
    rows = [
        line(8, 1.0, num_images=4),
        {"images_seen": 16, "num_images": 8, "ms_ssim": 0.1},
        line(24, 5.0),
        line(32, 6.0),
    ]
    found = standing_of(rows, BY_SWD, {8, 16, 24, 32})
    assert found.best is rows[2]
    assert found.since == 1


def test_patience_ends_a_run_once_so_many_in_a_row_were_no_better():
    found = Standing("swd", line(20_000, 11.93), since=3)
    assert found.enough(3) == "no better swd in 3 evaluation(s); best 11.93 after 20,000 images"
    assert found.enough(2) == found.enough(3)
    assert found.enough(4) == ""
    assert found.enough(0) == ""
    assert Standing("swd", None, since=9).enough(3) == "", "nothing to go back to"


def test_an_evaluation_is_told_with_what_the_best_is():
    best = line(8, 11.9) | {"ms_ssim": 0.3, "swd_16": 7.0, "best": True}
    assert in_words(best, Standing("swd", best, 0)) == "metrics: swd 11.9 (the best so far)  ms_ssim 0.3"
    other = line(16, 12.3456) | {"ms_ssim": None, "best": False}
    assert in_words(other, Standing("swd", best, 1)) == "metrics: swd 12.35 (best 11.9 after 8 images)  ms_ssim -"


@pytest.mark.parametrize("every", [4, 6, 8, 10, 16, 100])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_dry_run_counts_the_evaluations_that_the_loop_will_make(every, steps):
    cfg = Config(train=TrainConfig(batch_size=8), eval=EvalConfig(every_images=every))
    total = 8 * steps
    entry = Maintenance(every, lambda _: None)
    due = [seen for seen in range(8, total + 1, 8) if entry.due(seen - 8, seen, seen == total)]
    assert [seen for seen in range(0, total + 1, 8) if due_at(cfg, seen, total)] == due
    assert plan_in_words(cfg, total).startswith(f"{len(due)}, every {every:,} images and at the end")


def test_a_mark_goes_with_its_checkpoint(tmp_path):
    folder = checkpoints.folder_of(tmp_path, 8)
    folder.mkdir(parents=True)
    mark_best(tmp_path, folder)
    keep_best(tmp_path, Standing("swd", None, 0))
    assert checkpoints.best(tmp_path) == folder.name, "no figures, but it was marked once"
    checkpoints.set_aside_after(tmp_path, 0)
    keep_best(tmp_path, Standing("swd", None, 0))
    assert checkpoints.best(tmp_path) == ""


def test_a_garbled_mark_is_made_anew_from_the_evaluations(tmp_path):
    mark = tmp_path / "checkpoints" / "best.json"
    mark.parent.mkdir()
    for garbled in ("", "{", "[]", '{"checkpoint": 3}'):
        mark.write_text(garbled)
        keep_best(tmp_path, Standing("swd", line(8, 5.0), 0))
        assert checkpoints.best(tmp_path) == "images-000000008"
        mark.write_text(garbled)
        keep_best(tmp_path, Standing("swd", None, 0))
        assert not mark.exists()
