import itertools
import math

import pytest

from pipeline.schedule import Schedule


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_rates_are_whole_until_the_start_and_nothing_at_the_end(kind):
    schedule = Schedule(kind, 0.25, 4000)
    assert [schedule.factor(seen) for seen in (0, 500, 1000)] == [1, 1, 1]
    assert schedule.factor(4000) == 0
    assert schedule.factor(5000) == 0, "a run that goes on past its end, since its last batch is full"
    falling = [schedule.factor(seen) for seen in range(1000, 4001, 100)]
    assert all(before > after for before, after in itertools.pairwise(falling))


def test_the_way_down_is_a_line_or_half_a_wave():
    line, wave = (Schedule(kind, 0.5, 1000) for kind in ("linear", "cosine"))
    for seen, share in ((500, 0.0), (600, 0.2), (750, 0.5), (900, 0.8)):
        assert line.factor(seen) == pytest.approx(1 - share)
        assert wave.factor(seen) == pytest.approx(math.cos(math.pi * share / 2) ** 2)


def test_a_longer_run_stretches_the_way_down():
    assert Schedule("linear", 0.5, 2000).factor(1500) == Schedule("linear", 0.5, 1000).factor(750)


def test_without_a_kind_nothing_falls():
    assert {Schedule("none", 0.0, 100).factor(seen) for seen in (0, 50, 100)} == {1.0}
    assert Schedule("linear", 0.0, 0).factor(5) == 1, "of no known length"
