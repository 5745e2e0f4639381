"""The collector stays out of the steps and is as it was afterwards."""

import gc
import weakref

import pytest

from pipeline.garbage import collect, collected_between_steps


class Node:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_while_entered_but_by_asking():
    with collected_between_steps():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        node = weakref.ref(Node())
        for _ in range(5000):
            Node()
        assert node() is not None
        collect(0)
        assert node() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off_and_an_error_leaves_it_as_it_was():
    gc.disable()
    try:
        with collected_between_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="stop"), collected_between_steps():
        raise RuntimeError("stop")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
