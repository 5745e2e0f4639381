import signal

import pytest
import torch

from pipeline import faults
from pipeline.config import ConfigError
from pipeline.faults import KINDS, Faults, FaultyStep


def faults_of(monkeypatch, text, rank=0, restart="0"):
    monkeypatch.setenv("DCGAN_FAULT", text)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
    return Faults.from_environment(rank)


def due(found, steps):
    return [sorted(found.due(step)) for step in range(steps)]


def test_without_the_variable_the_step_is_the_plain_one(monkeypatch):
    monkeypatch.delenv("DCGAN_FAULT", raising=False)
    step = object()
    assert Faults.from_environment(0).wrap(step, 8) is step
    assert faults_of(monkeypatch, "").wrap(step, 8) is step


@pytest.mark.parametrize("text", ["nan", "nan:1", "nan:1:2:3", "nan:x:1", "nan:0:-1", "cough:0:1", "nan:0:1;kill:1:2"])
def test_what_is_not_understood_is_one_line_with_the_kinds(monkeypatch, text):
    with pytest.raises(ConfigError, match=r"DCGAN_FAULT must be kind:rank:step") as caught:
        faults_of(monkeypatch, text)
    assert all(kind in str(caught.value) for kind in KINDS)
    assert repr(text) in str(caught.value)


def test_a_fault_that_happens_once_is_then_gone(monkeypatch):
    found = faults_of(monkeypatch, "nan:0:2")
    assert due(found, 4) == [[], [], ["nan"], []]
    assert due(found, 4) == [[], [], [], []], "a run that goes back gets past it"


def test_a_lasting_fault_comes_back_from_its_step_on(monkeypatch):
    found = faults_of(monkeypatch, "nan-from:0:2")
    assert due(found, 4) == [[], [], ["nan-from"], ["nan-from"]]
    assert due(found, 4) == [[], [], ["nan-from"], ["nan-from"]]


def test_several_faults_at_one_step_all_fire(monkeypatch):
    assert due(faults_of(monkeypatch, "nan:0:1,exception:0:1,slow-from:0:0"), 2) == [
        ["slow-from"],
        ["exception", "nan", "slow-from"],
    ]


def test_each_rank_has_its_own_and_a_restarted_one_none(monkeypatch):
    text = "nan:0:0,term:1:0"
    assert due(faults_of(monkeypatch, text, rank=0), 1) == [["nan"]]
    assert due(faults_of(monkeypatch, text, rank=1), 1) == [["term"]]
    assert due(faults_of(monkeypatch, text, rank=2), 1) == [[]]
    assert due(faults_of(monkeypatch, text, rank=0, restart="1"), 1) == [[]]


def test_slow_writes_go_by_the_variable_not_by_the_step(monkeypatch):
    assert faults_of(monkeypatch, "slow-write:0:0").slow_write() == faults.SLOW_WRITE_S
    assert faults_of(monkeypatch, "nan:0:0").slow_write() == 0


class Recorder:
    """A step that keeps what it is given."""

    def __init__(self):
        self.calls = []
        self.hopeless = "the step's own"

    def __call__(self, images, latents, images_seen, batch_size):
        self.calls.append((images, latents, images_seen, batch_size))
        return torch.zeros(7)


def test_a_faulty_step_passes_everything_on_but_the_latents_it_spoils(monkeypatch):
    inner = Recorder()
    step = faults_of(monkeypatch, "nan:0:1").wrap(inner, 8)
    assert isinstance(step, FaultyStep)
    assert step.hopeless == "the step's own"
    images, latents = torch.ones(8, 4, 4, 3), torch.ones(8, 2)
    for seen in (0, 8, 16):
        step(images, latents, seen, 8)
    assert [call[2:] for call in inner.calls] == [(0, 8), (8, 8), (16, 8)]
    assert all(call[0] is images for call in inner.calls)
    assert [bool(call[1].isnan().all()) for call in inner.calls] == [False, True, False]


def test_an_exception_names_its_step_and_leaves_the_step_undone(monkeypatch):
    inner = Recorder()
    step = faults_of(monkeypatch, "exception:0:1").wrap(inner, 8)
    step(None, torch.ones(1), 0, 8)
    with pytest.raises(RuntimeError, match="a fault on purpose at step 1"):
        step(None, torch.ones(1), 8, 8)
    assert len(inner.calls) == 1


@pytest.mark.parametrize(
    ("kind", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP), ("term", signal.SIGTERM)]
)
def test_signals_go_to_the_process_itself_before_the_step(monkeypatch, kind, number):
    sent = []
    inner = Recorder()
    monkeypatch.setattr(faults.os, "kill", lambda pid, what: sent.append((pid, what, len(inner.calls))))
    step = faults_of(monkeypatch, f"{kind}:0:1").wrap(inner, 8)
    for seen in (0, 8, 16):
        step(None, torch.ones(1), seen, 8)
    assert sent == [(faults.os.getpid(), number, 1)]


def test_a_slow_rank_takes_its_time_before_each_step(monkeypatch):
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    step = faults_of(monkeypatch, "slow-from:0:1").wrap(Recorder(), 8)
    for seen in (0, 8, 16):
        step(None, torch.ones(1), seen, 8)
    assert slept == [faults.SLOW_S] * 2
