"""The fast round as one CUDA graph: forward, backward, the ranks' exchange, both optimisers, G's average: one launch.

At 64 x 64 a step is some hundred kernels of a few microseconds, and the host takes longer to launch them than the GPU
to run them.  A graph is launched once.  It reads and writes the memory that it was recorded with, so what changes from
step to step is put there first: images, latents and image numbers are copied; the learning rates, the weight of G's
average and the noise's deviation are numbers on the device, computed from the images seen as ever.

What may differ in which kernels run (whether G learns, whether R1 is due, whether there is noise) makes another kind
of step, with a graph of its own.  The first steps of a kind run as usual, on the stream that it is recorded on, and are
steps of the training like all others; then one is recorded, which computes nothing, and launched.

With many ranks the exchange is recorded too, on the communicator that everything else uses.  DistributedDataParallel
wants to be wrapped on the recording stream, and 11 steps beforehand, in the first 10 of which it takes times
(torch's notes on CUDA graphs, "Usage with DistributedDataParallel").  Autocast keeps no weights of a recording for
later use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline import precision as precision_
from pipeline.players import Players
from pipeline.precision import Precision
from pipeline.step import FastStep, Turn

WARM_UP_STEPS = 3
"""Of each kind before it is recorded: lazily made state, libraries' choices of algorithms."""
WARM_UP_STEPS_RANKS = 11

Work = Callable[[], Tensor]


class Recorder(Protocol):
    """What runs work apart from the rest, and records it."""

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """The context to work in, in order with what comes before and after it."""
        ...

    def record(self, work: Work) -> Work:
        """The same work as one launch: it reads and writes the same memory each time."""
        ...


class CudaRecorder:
    """Work on a stream of its own, recorded as CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # The feed's threads take pinned memory meanwhile, which would end a recording that looks at other threads.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            output = work()

        def launch() -> Tensor:
            graph.replay()
            return output

        return launch


@dataclass(frozen=True)
class Kind:
    """What makes two steps run the same kernels."""

    g_learns: bool
    r1_due: bool
    noisy: bool
    shape: torch.Size
    dtype: torch.dtype
    """Of the images."""


@dataclass
class Recording:
    """A kind's memory, and its graph once it is recorded."""

    images: Tensor
    latents: Tensor
    numbers: Tensor
    steps: int = 0
    """Done without a graph."""
    launch: Work | None = None


class Dial:
    """A number that a graph reads from the device and the host sets, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros((), device=device)
        self._value = 0.0

    def set(self, value: float) -> None:
        if value != self._value:
            self.tensor.fill_(value)
            self._value = value


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let the optimiser be recorded: its learning rates, like its step counts, become numbers on the device.

    It must not have stepped yet; what a checkpoint puts back comes afterwards.
    """
    assert not optimizer.state
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are to be so


class GraphStep(FastStep):
    """FastStep's round, launched as a whole."""

    def __init__(
        self, players: Players, precision: Precision, *, recorder: Recorder | None = None, **options: Any
    ) -> None:
        """
        Args:
            recorder: for tests; None: CUDA's.
            options: FastStep's.
        """
        device = next(players.generator.parameters()).device
        for optimizer in (players.optimizer_g, players.optimizer_d):
            make_capturable(optimizer, device)
        super().__init__(players, precision, **options)
        self.recorder = recorder or CudaRecorder(device)
        self.recordings: dict[Kind, Recording] = {}
        self._noise_std, self._ema_weight = Dial(device), Dial(device)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return self.recorder.apart()

    def close(self) -> None:
        self.recordings.clear()  # NCCL waits for the graphs that hold its calls before it gives a communicator up

    def autocast(self) -> Any:
        return precision_.autocast(self.precision, self.device, cache=False)

    def _run(self, images: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        assert not isinstance(turn.noise_std, Tensor)
        assert not isinstance(turn.ema_weight, Tensor)
        kind = Kind(turn.g_learns, turn.r1_due, turn.noise_std > 0, images.shape, images.dtype)
        recording = self.recordings.get(kind)
        if recording is None:
            recording = Recording(torch.empty_like(images), torch.empty_like(latents), torch.empty_like(turn.numbers))
            self.recordings[kind] = recording
        recording.images.copy_(images, non_blocking=True)
        recording.latents.copy_(latents, non_blocking=True)
        recording.numbers.copy_(turn.numbers, non_blocking=True)
        self._noise_std.set(turn.noise_std)
        self._ema_weight.set(turn.ema_weight)
        inside = replace(
            turn,
            numbers=recording.numbers,
            noise_std=self._noise_std.tensor if kind.noisy else 0.0,
            ema_weight=self._ema_weight.tensor,
        )

        def work() -> Tensor:
            return super(GraphStep, self)._run(recording.images, recording.latents, inside)

        with self._hooks_outside():
            if recording.launch is None and recording.steps < self._warm_up_steps:
                recording.steps += 1
                with self.recorder.apart():
                    return work()
            if recording.launch is None:
                recording.launch = self.recorder.record(work)
            return recording.launch().clone()  # the next launch writes there again

    @property
    def _warm_up_steps(self) -> int:
        return WARM_UP_STEPS_RANKS if self.players.parallel else WARM_UP_STEPS

    @contextlib.contextmanager
    def _hooks_outside(self) -> Iterator[None]:
        """Call before_backward here, where the whole step is still to come: within a graph nobody can be told."""
        told, self.before_backward = self.before_backward, lambda: None
        told()
        try:
            yield
        finally:
            self.before_backward = told
