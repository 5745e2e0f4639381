import json

import pytest

from pipeline.checkpoint import Checkpoint
from pipeline.errors import Diverged
from pipeline.history import History, after_trouble, history_of
from pipeline.watch import Diverging


def found_at(images_seen, **manifest):
    return Checkpoint(None, {"images_seen": images_seen} | manifest)


def trouble_at(images_seen):
    return Diverging("10 steps in a row were not finite", images_seen)


def test_after_trouble_the_order_goes_on_behind_the_images_at_which_it_happened():
    history = after_trouble(History(), trouble_at(120), found_at(100), most=3)
    assert (history.order_offset, history.rollbacks, history.trouble_at, history.went_back_to) == (20, 1, 120, 100)
    assert 100 + history.order_offset == 120
    assert "after 120 images: back to 100 images and on with other images (1 of 3 times)" in history.news


def test_each_time_it_comes_back_the_order_is_further_ahead():
    history, seen = History(), set()
    for rollbacks, (trouble, checkpoint) in enumerate([(120, 100), (112, 80), (96, 80)], start=1):
        was_at = trouble + history.order_offset
        history = after_trouble(history, trouble_at(trouble), found_at(checkpoint), most=9)
        assert checkpoint + history.order_offset == was_at, "where the images that went wrong end"
        assert history.rollbacks == rollbacks
        assert history.trouble_at == 120, "the furthest it came"
        seen.add(history.order_offset)
    assert len(seen) == 3


def test_without_a_checkpoint_it_goes_back_to_the_beginning():
    history = after_trouble(History(), trouble_at(40), None, most=1)
    assert (history.order_offset, history.went_back_to) == (40, 0)


@pytest.mark.parametrize("most", [0, 2])
def test_after_so_many_times_the_run_has_diverged(most):
    history = History()
    for _ in range(most):
        history = after_trouble(history, trouble_at(40), None, most)
    with pytest.raises(Diverged, match=rf"after 40 images, and going back {most} time.*watch\.max_rollbacks") as caught:
        after_trouble(history, trouble_at(40), None, most)
    assert caught.value.exit_code == 76
    assert caught.value.shared, "every rank raises it"
    assert "\n" not in str(caught.value)


def test_past_the_trouble_only_the_order_is_remembered():
    history = after_trouble(History(), trouble_at(120), found_at(100), most=3)
    assert history.past_trouble(120) == history
    assert history.past_trouble(128) == History(order_offset=20)
    assert History().past_trouble(8) == History()


def test_a_checkpoints_manifest_keeps_it():
    history = after_trouble(History(), trouble_at(120), found_at(100), most=3)
    kept = json.loads(json.dumps(history.manifest()))
    again = history_of(found_at(110, **kept))
    assert again.manifest() == history.manifest()
    assert again.news == "", "told once"
    assert history_of(None) == history_of(found_at(110)) == History()


def test_a_resumed_run_counts_on():
    kept = after_trouble(History(), trouble_at(120), found_at(100), most=2).manifest()
    history = after_trouble(history_of(found_at(104, **kept)), trouble_at(116), found_at(100), most=2)
    assert (history.rollbacks, history.order_offset) == (2, 20 + 16)
    with pytest.raises(Diverged):
        after_trouble(history, trouble_at(116), found_at(100), most=2)
