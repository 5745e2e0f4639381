import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline import watch
from pipeline.config import WatchConfig
from pipeline.watch import CollapseWatch, Diverging, HangWatch, OwnTime, SkipWatch, slow_ranks

ROOT = Path(__file__).resolve().parent.parent


def test_so_many_skipped_steps_in_a_row_are_divergence():
    skips = SkipWatch(3)
    for seen in (8, 16):
        skips.look(True, seen)
    with pytest.raises(Diverging, match="3 steps in a row were not finite") as caught:
        skips.look(True, 24)
    assert caught.value.images_seen == 24
    assert (skips.streak, skips.total) == (3, 3)


def test_one_good_step_ends_a_row_of_skipped_ones_but_the_total_stays():
    skips = SkipWatch(3)
    for hopeless in (True, True, False) * 5:
        skips.look(hopeless, 8)
    assert (skips.streak, skips.total) == (0, 10)


def test_the_first_skipped_step_is_enough_where_one_is_allowed():
    with pytest.raises(Diverging):
        SkipWatch(1).look(True, 8)


def looks(cfg, rows, images=10):
    """What the watch says at each row of (loss_d, diversity)."""
    collapse = CollapseWatch(cfg)
    return [collapse.look({"loss_d": loss_d, "diversity": diversity}, images) for loss_d, diversity in rows]


CFG = WatchConfig(collapse_images=30, min_loss_d=0.01, min_diversity=0.1)
FINE, WON, ONE, BOTH, UNKNOWN = (1.3, 0.9), (0.001, 0.9), (1.3, 0.05), (0.001, 0.05), (math.nan, math.nan)


def test_a_sign_that_holds_for_so_many_images_is_a_collapse_told_once():
    assert looks(CFG, [FINE, WON, WON, WON, WON, WON]) == [
        "",
        "",
        "",
        "D has won: its loss is 0.001, below 0.01 for 30 images",
        "",
        "",
    ]


def test_images_that_look_alike_are_the_other_sign():
    said = "G draws one picture: the diversity of its images is 0.05, below 0.1 for 30 images"
    assert looks(CFG, [ONE] * 4) == ["", "", said, ""]


def test_a_sign_that_passes_begins_anew_and_is_told_again():
    said = looks(CFG, [WON, WON, FINE, WON, WON, WON, FINE, WON, WON, WON])
    assert [i for i, text in enumerate(said) if text] == [5, 9]


@pytest.mark.parametrize("row", [UNKNOWN, (0.01, 0.1)])
def test_a_row_without_numbers_or_at_the_limit_is_no_sign(row):
    assert not any(looks(CFG, [WON, WON, row, WON, WON]))
    assert not any(looks(CFG, [row] * 9))


def test_both_signs_are_counted_apart_and_told_together():
    said = looks(CFG, [BOTH, BOTH, BOTH])
    assert said[:2] == ["", ""]
    assert "D has won" in said[2]
    assert "; G draws one picture" in said[2]
    said = looks(CFG, [WON, BOTH, BOTH, ONE])
    assert ["D has won" in text for text in said] == [False, False, True, False]
    assert ["one picture" in text for text in said] == [False, False, False, True]


def test_nobody_looks_where_it_is_switched_off():
    assert not any(looks(WatchConfig(collapse_images=0, min_loss_d=100), [BOTH] * 9))


@pytest.mark.parametrize(
    ("own_ms", "slow"),
    [
        ([500.0], []),
        ([10.0, 10.0], []),
        ([10.0, 40.0], [1]),
        ([40.0, 10.0], [0]),
        ([10.0, 14.0], []),  # not by the ratio
        ([10.0, 11.0, 9.0, 60.0], [3]),
        ([60.0, 10.0, 70.0, 10.0], [0, 2]),
        ([0.0, 0.0, 0.0, 0.0], []),
        ([0.1, 0.9, 0.1, 0.1], []),  # nine times the others, and yet nothing beside the step
    ],
)
def test_a_rank_is_slow_by_the_median_and_by_its_share_of_the_step(own_ms, slow):
    assert slow_ranks(own_ms, step_ms=100.0, ratio=1.5) == slow
    assert slow_ranks(own_ms, step_ms=100.0, ratio=0) == []


def test_a_ranks_own_time_is_the_mean_between_meeting_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    own = OwnTime(torch.device("cpu"))
    assert own.read() == 0
    own.end()  # the first step: the ranks have not met yet
    for worked, waited in ((0.010, 5.0), (0.030, 7.0)):
        own.begin()
        now[0] += worked
        own.end()
        now[0] += waited
        own.end()  # a second backward pass of the same step
    assert own.read() == pytest.approx(20)
    assert own.read() == 0, "since the last read"


def test_a_watch_that_is_closed_or_switched_off_leaves_no_thread(tmp_path):
    for hang_s in (0, 900):
        hang = HangWatch(hang_s, tmp_path, 0, pytest.fail)
        before = set(threading.enumerate())
        for _ in range(3):
            hang.beat()
        assert len(set(threading.enumerate()) - before) == bool(hang_s)
        hang.close()
        assert set(threading.enumerate()) == before
    assert not list(tmp_path.iterdir())


def test_a_beat_may_ask_for_patience_and_the_next_one_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda *_, **__: None)  # it would end this process
    ended = threading.Event()
    monkeypatch.setattr(HangWatch, "_end", lambda *_: ended.set())
    hang = HangWatch(0.02, tmp_path, 0, print)
    hang.beat(1000)
    assert not ended.wait(0.3), "fifteen times as long as a step may take"
    hang.beat()
    assert ended.wait(60)
    hang.close()


HANGS = """
import sys, threading
from pathlib import Path
from pipeline.watch import HangWatch

def feeds_the_step():
    threading.Event().wait()

threading.Thread(target=feeds_the_step, daemon=True).start()
hang = HangWatch(1, Path(sys.argv[1]), 3, lambda reason: print("told:", reason, flush=True))
hang.beat()
def step_that_hangs():
    threading.Event().wait()
step_that_hangs()
"""
KEEPS_PYTHONS_LOCK = """
import ctypes, faulthandler, sys, threading
from pathlib import Path
from pipeline.watch import HangWatch

armed = threading.Event()
arm = faulthandler.dump_traceback_later
def dump_traceback_later(*arguments, **keys):
    arm(*arguments, **keys)
    armed.set()
faulthandler.dump_traceback_later = dump_traceback_later
HangWatch(1, Path(sys.argv[1]), 3, print).beat()
armed.wait()
def step_that_hangs():
    ctypes.PyDLL(None).sleep(100)
step_that_hangs()
"""


def test_a_process_without_steps_ends_and_leaves_where_each_thread_stands(tmp_path):
    """Also one in which no Python runs any more, by the system's timer, to stderr."""
    start = time.monotonic()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for script in (HANGS, KEEPS_PYTHONS_LOCK)
    ]
    try:
        (out, err), (_, silent) = (child.communicate(timeout=60) for child in children)
    finally:
        for child in children:
            child.kill()
    assert time.monotonic() - start < 20
    assert [child.returncode for child in children] == [1, 1]
    assert out.startswith("told: no step for 1 seconds on rank 3 (")
    path = tmp_path / "hang-rank-3.txt"
    assert f"where each thread stands: {path}" in err
    stacks = path.read_text()
    assert f"process {children[0].pid}: no step for 1 seconds on rank 3" in stacks
    for where in ("in step_that_hangs", "in feeds_the_step", "in _watch"):
        assert where in stacks
    assert "in step_that_hangs" in silent
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
