import numpy as np
import pytest

from pipeline.geometry import place
from pipeline.order import Order, Slice


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    order = Order(seed=1, num_images=97)
    first, second = order.items(np.arange(97)), order.items(np.arange(97, 194))
    assert sorted(first) == sorted(second) == list(range(97))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Order(seed=2, num_images=97).items(np.arange(97)))


def test_position_alone_decides():
    walked = Order(seed=1, num_images=10)
    everything = walked.items(np.arange(1000))
    for start in (990, 0, 503):  # backwards too: no state is carried along
        assert np.array_equal(
            Order(seed=1, num_images=10).items(np.arange(start, start + 7)), everything[start : start + 7]
        )
        assert np.array_equal(walked.items(np.arange(start, start + 7)), everything[start : start + 7])


def test_a_set_smaller_than_a_batch_is_walked_several_times_a_batch():
    items = Order(seed=1, num_images=3).items(Slice(batch_size=9).numbers(0))
    assert all(sorted(items[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_see_the_batch_of_one(world_size):
    batch = Slice(batch_size=8).numbers(images_seen=24)
    parts = [Slice(8, rank, world_size).numbers(24) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), batch)
    assert {len(p) for p in parts} == {8 // world_size}


def test_permutations_are_not_biased():
    first = np.array([Order(seed=s, num_images=5).permutation(0)[0] for s in range(2000)])
    assert np.bincount(first, minlength=5).min() > 330  # 400 expected, standard deviation 18


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        ((218, 178), (64, 64), (78, 64, 7, 0)),  # CelebA, as torchvision's Resize(64) and CenterCrop(64)
        ((178, 218), (64, 64), (64, 78, 0, 7)),
        ((64, 64), (64, 64), (64, 64, 0, 0)),
        ((10, 300), (64, 64), (64, 1920, 0, 928)),
        ((100, 100), (64, 32), (64, 64, 0, 16)),
        ((100, 30), (64, 32), (106, 32, 21, 0)),
        ((3, 1), (8, 8), (24, 8, 8, 0)),
    ],
)
def test_the_window_is_covered_and_centred(size, window, expected):
    assert tuple(place(*size, window)) == expected


def test_no_size_leaves_the_window_uncovered():
    for height in range(1, 90, 3):
        for width in range(1, 90, 7):
            for window in ((64, 64), (32, 64), (9, 8)):
                p = place(height, width, window)
                assert p.top >= 0
                assert p.left >= 0
                assert p.top + window[0] <= p.height
                assert p.left + window[1] <= p.width
                assert p.height == window[0] or p.width == window[1]
