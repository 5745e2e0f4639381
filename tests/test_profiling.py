"""A look at single steps: what it shows, and that it changes nothing."""

import gzip
import json
import time

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline import profiling
from pipeline.cli import train as command
from pipeline.config import ConfigError, ProfileConfig
from pipeline.profiling import MEASURED_STEPS, PHASES, WARM_UP_STEPS, Phases, Trace
from tests.commands import rows, status_of
from tests.numbered import words, write_numbered
from tests.players import assert_same
from tests.ranks import Launch, run_launches

CPU = torch.device("cpu")
STEP = ("data", "forward", "backward", "optimiser", "forward", "backward", "optimiser", "rest", "optimiser")
"""What a step marks."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("profiling") / "images", 6)


@pytest.fixture
def train(images, tmp_path, capsys):
    def call(run="run", **settings):
        capsys.readouterr()
        assert command.main(words(images, tmp_path / run, **settings)) == 0
        return tmp_path / run, capsys.readouterr().err

    return call


def trace_of(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_profiled_run_leaves_a_trace_a_table_and_the_same_weights(train):
    plain, _ = train("plain", train__max_images=48)
    looked, said = train("looked", train__max_images=48, profile__steps=3, profile__from_step=4)
    assert_same(*(checkpoints.load(checkpoints.newest(run)) for run in (plain, looked)))
    assert [r["loss_d"] for r in rows(plain / "stats.jsonl")] == [r["loss_d"] for r in rows(looked / "stats.jsonl")]
    name = "images-000000000-rank-0"
    assert {p.name for p in (looked / "profile").iterdir()} == {f"{name}.pt.trace.json.gz", f"{name}.txt"}
    events = trace_of(looked / "profile" / f"{name}.pt.trace.json.gz")
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 3
    # Each of the three steps updates both networks once.
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step#") and e.get("ph") == "X"]
    assert len(updates) == 2 * 3
    assert "convolution" in (looked / "profile" / f"{name}.txt").read_text()
    assert f"profile of 3 steps: {looked / 'profile'}" in said
    assert not (plain / "profile").exists()


def test_a_trace_begins_with_the_first_step_that_it_may(train):
    run, _ = train(train__max_images=12, profile__steps=2, profile__from_step=2)
    (path,) = (run / "profile").glob("*.gz")
    assert len({e["name"] for e in trace_of(path) if e.get("name", "").startswith("ProfilerStep#")}) == 2


def test_a_run_that_ends_before_its_trace_writes_what_there_is(train):
    run, said = train(train__max_images=24, profile__steps=100, profile__from_step=3)
    (path,) = (run / "profile").glob("*.gz")
    assert trace_of(path)
    assert "profile of 4 steps" in said
    run, said = train("shorter", train__max_images=8, profile__steps=1)
    assert "no profile: 2 steps were made, and profile.from_step is 20" in said
    assert not (run / "profile").exists()


def test_a_trace_that_cannot_be_written_is_told_and_training_goes_on(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("in the way")
    run, said = train(train__max_images=24, profile__steps=2, profile__from_step=2)
    assert f"cannot write the profile {run / 'profile'}" in said
    assert status_of(run)["state"] == "finished"


def test_tensorboard_shows_the_table(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = train(train__max_images=16, profile__steps=1, profile__from_step=2)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    (event,) = board.Tensors("Profile/text_summary")
    assert "convolution" in event.tensor_proto.string_val[0].decode()


def test_after_a_hundred_steps_a_line_and_the_status_say_where_the_time_goes(train):
    run, said = train(train__max_images=4 * (MEASURED_STEPS + 1))
    (line,) = [line for line in said.splitlines() if line.startswith("where the time goes, steps 11 to 100: data ")]
    shares = status_of(run)["time_percent"]
    assert tuple(shares) == PHASES
    assert sum(shares.values()) == pytest.approx(100, abs=0.1)
    assert all(shares[phase] > 0 for phase in PHASES if phase != "communication")
    assert shares["communication"] == 0
    assert all(f"{phase} " in line for phase in PHASES)
    run, said = train("short", train__max_images=4 * (MEASURED_STEPS - 1))
    assert "where the time goes" not in said
    assert "time_percent" not in status_of(run)


def test_on_many_ranks_what_backward_waits_for_is_communication(images, tmp_path, capfd):
    settings = {"train__max_images": 4 * MEASURED_STEPS, "profile__steps": 1, "profile__every_rank": "true"}
    for run in ("fast", "reference"):
        mode = {"train__mode": "reference"} if run == "reference" else {}
        launch = Launch(2, words(images, tmp_path / run, **settings, **mode))
        assert run_launches([launch]) == [[0, 0]]
        shares = status_of(tmp_path / run)["time_percent"]
        assert all(shares[phase] > 0 for phase in PHASES), (run, shares)
        assert {p.name.split(".")[0] for p in (tmp_path / run / "profile").iterdir()} == {
            f"images-000000000-rank-{rank}" for rank in (0, 1)
        }
    assert capfd.readouterr().err.count("where the time goes") == 2, "rank 0 only"


def clock(monkeypatch, ticks) -> None:
    left = iter(ticks)
    monkeypatch.setattr(time, "perf_counter", lambda: next(left))


def test_each_phase_has_the_time_up_to_its_mark(monkeypatch):
    counted = MEASURED_STEPS - WARM_UP_STEPS
    clock(monkeypatch, range(10 * counted))
    phases = Phases(CPU)
    for _ in range(WARM_UP_STEPS):
        phases.begin()
        for phase in STEP:
            phases.mark(phase)
        assert phases.done() is None
    for i in range(counted):
        phases.begin()
        for phase in STEP:
            phases.mark(phase)
        shares = phases.done()
        assert (shares is None) == (i + 1 < counted)
    assert shares is not None
    # A second for each mark: nine a step, and the one that lies between two steps belongs to the rest.
    seconds = 10 * counted - 1
    expected = {"data": 1, "forward": 2, "backward": 2, "communication": 0, "optimiser": 3}
    for phase, count in expected.items():
        assert shares[phase] == pytest.approx(100 * count * counted / seconds)
    assert shares["rest"] == pytest.approx(100 * (2 * counted - 1) / seconds)
    phases.mark("data")
    assert phases.done() is None, "told once"


def test_time_after_the_last_gradient_is_communication(monkeypatch):
    monkeypatch.setattr(profiling, "WARM_UP_STEPS", 0)
    monkeypatch.setattr(profiling, "MEASURED_STEPS", 1)
    # begin, forward, the last gradient, the end of backward, and the rest.
    clock(monkeypatch, [0, 1, 3, 7, 8])
    network = torch.nn.Linear(2, 1)
    phases = Phases(CPU)
    phases.watch([network])
    phases.begin()
    loss = network(torch.ones(1, 2)).sum()
    phases.mark("forward")
    loss.backward()
    phases.mark("backward")
    phases.mark("rest")
    shares = phases.done()
    assert shares == pytest.approx(
        {"data": 0, "forward": 12.5, "backward": 25, "communication": 50, "optimiser": 0, "rest": 12.5}
    )
    assert not network.weight._post_accumulate_grad_hooks, "nothing stays behind"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, r"profile\.steps must be between 0 and 1000, got -1"),
        ({"steps": 1001}, r"profile\.steps must be between 0 and 1000, got 1001"),
        ({"from_step": 1}, r"profile\.from_step must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProfileConfig(**settings)


@pytest.mark.gpu
def test_marks_on_a_gpu_wait_for_nothing_and_events_tell_the_shares():
    phases = Phases(torch.device("cuda", 0))
    a = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    shares = None
    for _ in range(MEASURED_STEPS):
        torch.cuda.set_sync_debug_mode("error")
        try:
            phases.begin()
            for phase in STEP:
                a = (a @ a).clamp(-1, 1)
                phases.mark(phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        shares = phases.done()
    assert shares is not None
    assert sum(shares.values()) == pytest.approx(100)
    assert all(shares[phase] > 0 for phase in STEP)


@pytest.mark.gpu
def test_on_a_gpu_a_snapshot_of_its_memory_lies_beside_the_trace(tmp_path):
    said = []
    trace = Trace(ProfileConfig(steps=2, from_step=2), tmp_path, "x", lambda _table: None, said.append)
    a = torch.randn(64, 64, device="cuda")
    for _ in range(4):
        trace.before_step()
        a = a @ a
        trace.done()
    assert {p.name for p in tmp_path.iterdir()} == {"x.pt.trace.json.gz", "x.txt", "x.memory.pickle"}, said
    assert any(event.get("cat") == "kernel" for event in trace_of(tmp_path / "x.pt.trace.json.gz"))
