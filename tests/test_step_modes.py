"""Compiled and recorded steps against the eager one: equal meters, networks, moments and averages."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor

from kernels.normalize import normalize
from pipeline import assembly
from pipeline import checkpoint as checkpoints
from pipeline.checkpoint_writer import Snapshots
from pipeline.cli import train as command
from pipeline.config import (
    Config,
    ConfigError,
    DiscriminatorInputConfig,
    DistributedConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from pipeline.micro_batches import MicroBatchStep
from pipeline.schedule import Schedule
from pipeline.step import FastStep, ReferenceStep
from pipeline.step_compiled import CompiledStep, compile_problem
from pipeline.step_graph import WARM_UP_STEPS, WARM_UP_STEPS_RANKS, GraphStep
from tests import test_step
from tests.numbered import words, write_numbered
from tests.players import assert_same
from tests.ranks import run_ranks
from tests.test_step import N, data, make_step, networks, relative

CPU = torch.device("cpu")
CONFIG = Config(distributed=DistributedConfig(bucket_cap_mb=0.01))
TOLERANCE = test_step.TOLERANCE | {"fp16": 2e-2}
NUM_COMPILED = 6
"""G, D, D in G's half, two losses, the meters."""


class Replayer:
    """Stands for CUDA's recorder: what it records computes nothing, and is done again at each launch."""

    def __init__(self) -> None:
        self.inside = False
        self.num_apart = self.num_recorded = self.num_launched = 0

    @contextlib.contextmanager
    def apart(self):
        self.num_apart += 1
        yield

    def record(self, work):
        self.num_recorded += 1

        def launch():
            self.num_launched += 1
            return work()

        return launch


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def state_of(step) -> dict[str, torch.Tensor]:
    p = step.players
    found = {"ema": flat(p.ema.values())} if p.ema else {}
    for name, optimizer in (("generator", p.optimizer_g), ("discriminator", p.optimizer_d)):
        found[name] = flat(getattr(p, name).parameters())
        found[f"{name} statistics"] = flat(getattr(p, name).buffers())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found[f"{name} {key}"] = flat(state[key] for state in optimizer.state.values())
    return found


TECHNIQUES = {
    "plain": {},
    "schedule": {"schedule": Schedule("linear", 0.25, 10 * N)},
    "noise": {"d_input": DiscriminatorInputConfig(noise=0.2, noise_images=5 * N)},
    "all": {
        "loss": LossConfig(kind="hinge", r1=1.0, r1_every=3, d_steps=2),
        "d_input": DiscriminatorInputConfig(noise=0.2, noise_images=5 * N, augment=["color", "translation"]),
        "schedule": Schedule("cosine", 0.0, 10 * N),
    },
}


EXACT = OptimConfig(lr=2.0**-12, ema_half_life_images=40)
"""A learning rate that float32 holds, as a number on the device does."""


def rates_of(step) -> list[float]:
    return [float(o.param_groups[0]["lr"]) for o in (step.players.optimizer_g, step.players.optimizer_d)]


def assert_alike(ours, theirs, tolerance, exact=()):
    states = state_of(ours), state_of(theirs)
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        if name in exact:
            assert torch.equal(states[0][name], value), name
        else:
            assert relative(states[0][name], value) < tolerance, name


@pytest.mark.parametrize("techniques", TECHNIQUES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_in_the_memory_of_a_recording_equals_the_eager_one(techniques, precision):
    """All but the graph itself: memory, numbers on the device, kinds of steps, optimisers fit to be recorded."""
    # In one pass of 2N, as on a GPU: in two, autocast's cache would add D's gradients up in low precision.
    options = {"optim": EXACT, "half_life": 40, "joint": True, **TECHNIQUES[techniques]}
    recorder = Replayer()
    eager = make_step(FastStep, networks(), precision, **options)
    graph = make_step(GraphStep, networks(), precision, recorder=recorder, **options)
    exactly = "schedule" not in options  # its rates are rounded to float32 on the device
    for i in range(10):
        ours, theirs = (step(*data(i), i * N, N).clone() for step in (graph, eager))
        if exactly:
            assert torch.equal(ours, theirs), i
        else:
            assert torch.allclose(ours, theirs, rtol=TOLERANCE[precision], atol=TOLERANCE[precision] / 4), i
        assert torch.equal(graph.skipped, eager.skipped)
        assert rates_of(graph) == pytest.approx(rates_of(eager), rel=1e-6, abs=0)
    # The average takes its weight in float32, and by three operations in place of one.
    assert_alike(graph, eager, TOLERANCE[precision], set(state_of(eager)) - {"ema"} if exactly else ())
    assert recorder.num_apart + recorder.num_launched == 10
    assert recorder.num_apart == sum(r.steps for r in graph.recordings.values())
    assert recorder.num_recorded == sum(r.launch is not None for r in graph.recordings.values())


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (ReferenceStep, {}),
        (FastStep, {"joint": True}),
        (CompiledStep, {"backend": "aot_eager"}),
        (MicroBatchStep, {"micro_batch": N // 2}),
        (GraphStep, {"recorder": Replayer()}),
    ],
)
@pytest.mark.parametrize("half_life", [0, 40])
def test_our_adam_with_its_average_equals_torchs_in_every_kind_of_step(kind, extra, half_life):
    optim = dataclasses.replace(EXACT, ema_half_life_images=half_life)
    options = {"half_life": half_life, "loss": LossConfig(d_steps=2), **extra}
    theirs = make_step(kind, networks(), optim=optim, **options)
    ours = make_step(kind, networks(), optim=dataclasses.replace(optim, backend="triton"), **options)
    for i in range(2 * WARM_UP_STEPS + 2):
        assert torch.equal(*(step(*data(i), i * N, N) for step in (ours, theirs))), i
    # In a graph torch's average is moved by three operations in place of one.
    assert_alike(ours, theirs, TOLERANCE["fp32"], set(state_of(theirs)) - ({"ema"} if kind is GraphStep else set()))


def test_a_kind_of_step_is_recorded_once_after_its_first_steps_and_has_memory_of_its_own():
    recorder = Replayer()
    step = make_step(GraphStep, networks(), recorder=recorder, loss=LossConfig(d_steps=2))
    for i in range(2 * WARM_UP_STEPS):
        step(*data(i), i * N, N)
    assert (recorder.num_apart, recorder.num_recorded) == (2 * WARM_UP_STEPS, 0)
    for i in range(2 * WARM_UP_STEPS, 2 * WARM_UP_STEPS + 4):
        step(*data(i), i * N, N)
    assert (recorder.num_recorded, recorder.num_launched) == (2, 4)
    first, second = step.recordings.values()
    assert first.images.data_ptr() != second.images.data_ptr()


def test_what_a_recorded_step_returns_stays_when_the_next_one_is_launched():
    step = make_step(GraphStep, networks(), recorder=Replayer())
    found = [step(*data(i), i * N, N) for i in range(WARM_UP_STEPS + 3)]
    copies = [meters.tolist() for meters in found[-3:]]
    step(*data(9), 9 * N, N)
    assert [meters.tolist() for meters in found[-3:]] == copies
    assert len({meters.data_ptr() for meters in found}) == len(found)


def test_a_number_that_is_not_finite_moves_nothing_in_a_recorded_step_and_the_next_one_goes_on():
    step = make_step(GraphStep, networks(), half_life=40, recorder=Replayer())
    for i in range(WARM_UP_STEPS + 1):
        step(*data(i), i * N, N)
    before = state_of(step)
    pixels, latents = data(4)
    assert not torch.isfinite(step(pixels, latents * torch.nan, 4 * N, N)[:2]).all()
    after = state_of(step)
    assert all(
        torch.equal(after[name], before[name]) for name in before if "ema" not in name and "statistics" not in name
    )
    assert step.skipped.tolist() == [1, 1]
    assert step.hopeless > 0
    assert torch.isfinite(step(*data(5), 5 * N, N)).all()
    assert step.skipped.tolist() == [0, 0]
    assert step.hopeless == 0


def test_the_hook_before_the_ranks_meet_is_called_once_a_step_and_never_while_recording():
    step = make_step(GraphStep, networks(), recorder=Replayer())
    called = []
    step.before_backward = lambda: called.append(len(called))
    for i in range(WARM_UP_STEPS + 3):
        step(*data(i), i * N, N)
        assert len(called) == i + 1


def test_a_recorded_steps_state_goes_into_a_checkpoint_and_into_a_step_of_any_mode(tmp_path):
    graph = make_step(GraphStep, networks(), half_life=40, recorder=Replayer())
    for i in range(5):
        graph(*data(i), i * N, N)
    buffers = [checkpoints.buffers_of(graph.players)]
    state = Snapshots(graph.players).take(buffers)
    assert all(
        type(group["lr"]) is float for name in ("optimizer_g", "optimizer_d") for group in state[name]["param_groups"]
    )
    for kind, options in ((FastStep, {}), (GraphStep, {"recorder": Replayer()})):
        other = make_step(kind, networks(seed=1), half_life=40, **options)
        checkpoints.restore(other.players, copy.deepcopy(state), 0, 1)
        assert_alike(other, graph, 0.0, state_of(graph))
        assert torch.is_tensor(other.players.optimizer_g.param_groups[0]["lr"]) is (kind is GraphStep)
        other(*data(5), 5 * N, N)


def test_a_batch_that_is_normalised_already_gives_the_same_step():
    ours, theirs = (make_step(FastStep, networks()) for _ in range(2))
    pixels, latents = data(0)
    assert torch.equal(ours(normalize(pixels, torch.float32), latents, 0, N), theirs(pixels, latents, 0, N))


def recorded_ranks_equal_eager_ones(ranks):
    steps = []
    for kind, options in ((FastStep, {}), (GraphStep, {"recorder": Replayer()})):
        step = make_step(kind, networks(), optim=EXACT, half_life=40, joint=True, **options)
        assembly.wrap_players(step, ranks, CONFIG)
        steps.append(step)
    for i in range(WARM_UP_STEPS_RANKS + 2):
        pixels, latents = data(i)
        mine = slice(ranks.rank * N // 2, (ranks.rank + 1) * N // 2)
        ours, theirs = (step(pixels[mine], latents[mine], i * N, N) for step in steps)
        assert torch.equal(ours, theirs), i
    recorder = steps[1].recorder
    assert (recorder.num_apart, recorder.num_launched) == (WARM_UP_STEPS_RANKS + 1, 2)  # one to wrap the networks in
    assert_alike(steps[1], steps[0], TOLERANCE["fp32"], set(state_of(steps[0])) - {"ema"})


def test_many_ranks_are_recorded_after_eleven_steps():
    run_ranks(recorded_ranks_equal_eager_ones, 2)


needs_compiler = pytest.mark.skipif(bool(compile_problem(CPU)), reason=compile_problem(CPU))


@pytest.fixture
def compiling():
    """Nothing compiled before or left behind, and no pool of compiling processes, which would outlive the test."""
    torch._dynamo.reset()
    with inductor.patch(compile_threads=1), dynamo.patch():
        yield
    torch._dynamo.reset()


def three_steps_equal(step, reference, precision="fp32", num_steps=3):
    for i in range(num_steps):
        ours, theirs = (each(*data(i), i * N, N) for each in (step, reference))
        assert torch.allclose(ours, theirs, rtol=TOLERANCE[precision], atol=TOLERANCE[precision] / 4), i
        for name in step.caught:
            assert relative(step.caught[name], reference.caught[name]) < TOLERANCE[precision], (i, name)


@needs_compiler
def test_three_compiled_steps_equal_the_reference_and_gradients_return_to_d(compiling, monkeypatch):
    monkeypatch.setattr(test_step, "SIDE", 16)  # fewer kernels for the C++ compiler
    step, reference = make_step(CompiledStep, networks()), make_step(ReferenceStep, networks())
    three_steps_equal(step, reference)
    assert_alike(step, reference, TOLERANCE["fp32"])
    assert all(p.requires_grad and p.grad is not None for p in step.players.discriminator.parameters())
    assert step.recompiles == 0
    assert step.compiler.num_graphs == NUM_COMPILED


@pytest.mark.parametrize(
    ("techniques", "joint", "spectral_norm"), [("plain", False, False), ("plain", True, True), ("all", True, True)]
)
def test_whole_functions_are_traced_once_whatever_the_technique(compiling, techniques, joint, spectral_norm):
    """By torch's tracer alone, without the C++ compiler: no graph break, no trace after the first of a kind."""
    options = TECHNIQUES[techniques]
    step = make_step(CompiledStep, networks(spectral_norm=spectral_norm), joint=joint, backend="aot_eager", **options)
    three_steps_equal(
        step, make_step(FastStep, networks(spectral_norm=spectral_norm), joint=joint, **options), num_steps=8
    )
    assert step.recompiles == 0


def test_a_compilation_in_a_step_of_a_known_kind_is_counted(compiling):
    step = make_step(CompiledStep, networks(), backend="aot_eager")
    step(*data(0), 0, N)
    torch._dynamo.reset()
    step(*data(1), N, N)
    assert step.recompiles == NUM_COMPILED
    assert step.news().startswith(f"compile: {NUM_COMPILED} function(s) compiled anew")
    assert step.news() == ""


def compiled_ranks_equal_eager_ones(ranks):
    steps = []
    for kind, options in ((FastStep, {}), (CompiledStep, {"backend": "aot_eager"})):
        step = make_step(kind, networks(), joint=True, **options)
        assembly.wrap_players(step, ranks, CONFIG)
        steps.append(step)
    for i in range(3):
        pixels, latents = data(i)
        mine = slice(ranks.rank * N // 2, (ranks.rank + 1) * N // 2)
        ours, theirs = (step(pixels[mine], latents[mine], i * N, N) for step in steps)
        assert torch.allclose(ours, theirs, rtol=TOLERANCE["fp32"], atol=TOLERANCE["fp32"] / 4), i
    assert steps[1].recompiles == 0
    assert_alike(steps[1], steps[0], TOLERANCE["fp32"])


def test_compiled_ranks_equal_eager_ones():
    run_ranks(compiled_ranks_equal_eager_ones, 2)


@needs_compiler
def test_a_compiled_run_that_was_stopped_goes_on_to_the_same_weights(compiling, tmp_path):
    images = write_numbered(tmp_path / "images", 6)
    for run, stops in (("whole", [20]), ("parts", [12, 20])):
        for stop in stops:
            torch._dynamo.reset()
            assert command.main(words(images, tmp_path / run, train__max_images=stop, train__mode="compile")) == 0
    assert_same(*(checkpoints.load(checkpoints.newest(tmp_path / run)) for run in ("whole", "parts")))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            Config(train=TrainConfig(mode="graph")),
            "train.mode must be auto, eager, reference or compile on a CPU, got 'graph'",
        ),
        (
            Config(train=TrainConfig(mode="compile"), distributed=DistributedConfig(sync_batchnorm=True)),
            "train.mode must be auto, eager or reference with distributed.sync_batchnorm, got 'compile'",
        ),
    ],
)
def test_a_mode_that_cannot_be_is_refused_in_one_line(settings, found):
    with pytest.raises(ConfigError) as caught:
        assembly.require_mode(settings, CPU)
    assert str(caught.value) == found


def test_a_graph_of_another_adam_is_refused_in_one_line():
    cfg = Config(train=TrainConfig(mode="graph"), optim=OptimConfig(backend="apex"))
    with pytest.raises(ConfigError, match=r"optim\.backend must be torch or triton with train\.mode graph, got 'apex'"):
        assembly.require_mode(cfg, torch.device("cuda", 0))


def test_compile_without_a_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.mode must be another than compile here: no C\+\+ compiler is found"):
        assembly.require_mode(Config(train=TrainConfig(mode="compile")), CPU)
