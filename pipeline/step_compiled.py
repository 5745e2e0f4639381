"""The fast round by torch.compile: whole functions, one shape, no graph breaks.

Compiled are both networks' forward (and with it their backward), D's forward in G's half, the losses and the meters.
Under DistributedDataParallel the wrapper lies around the compiled network, which torch is told not to cut at the
wrapper's buckets: a network's gradients come at the end of its backward pass all at once, and travel then.

D's parameters are not frozen by requires_grad_(False) in G's half, since torch.compile has been reported to keep a
graph that such a change made stale (torch 2.9); D is called with detached ones instead, which no gradient can reach.

Penalties take the second derivative of D, which compiled functions do not have: they use D as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from pipeline.precision import Precision
from pipeline.step import FastStep, Players, Turn


def compile_problem(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty: it can."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"no C++ compiler is found ({compiler}; the variable CXX names another)"


class Compiler:
    """torch.compile with fixed shapes that counts what it compiles.

    Where more variants of one function are asked for than torch allows (8), torch raises in place of running on
    uncompiled.
    """

    def __init__(self, backend: str = "inductor") -> None:
        torch._dynamo.config.optimize_ddp = False
        self.num_graphs = 0
        self._backend = torch._dynamo.lookup_backend(backend)

    def _count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        compiled: Callable[..., Any] = self._backend(graph, inputs)
        return compiled

    def __call__(self, function: Any) -> Any:
        return torch.compile(function, backend=self._count, dynamic=False, fullgraph=True)


class CompiledStep(FastStep):
    """FastStep's round with compiled parts; the first step of each kind takes the time to compile."""

    def __init__(self, players: Players, precision: Precision, *, backend: str = "inductor", **options: Any) -> None:
        """
        Args:
            backend: torch's name of what compiles.
            options: FastStep's.
        """
        super().__init__(players, precision, **options)
        self.compiler = Compiler(backend)
        self.recompiles = 0
        """Graphs compiled in a step of a kind that had been compiled before; 0 where all is well."""
        self._told = 0
        self._known: set[tuple[Any, ...]] = set()
        players.compiled = {name: self.compiler(getattr(players, name)) for name in ("generator", "discriminator")}
        frozen = {name: p.detach() for name, p in players.discriminator.named_parameters()}  # the same memory

        def judge(images: Tensor) -> Tensor:
            outputs: Tensor = functional_call(players.discriminator, frozen, (images,))
            return outputs

        self._judge = self.compiler(judge)
        self._loss_d, self._loss_g = self.compiler(self.losses.discriminator), self.compiler(self.losses.generator)
        self._meters = self.compiler(super().meters)

    def _run(self, images: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        before = self.compiler.num_graphs
        meters = super()._run(images, latents, turn)
        kind = turn.g_learns, turn.r1_due, bool(turn.noise_std), images.shape, images.dtype
        if kind in self._known:
            self.recompiles += self.compiler.num_graphs - before
        self._known.add(kind)
        return meters

    def news(self) -> str:
        told, self._told = self._told, self.recompiles
        more = self.recompiles - told
        return (
            f"compile: {more} function(s) compiled anew, which costs time; TORCH_LOGS=recompiles says why"
            if more
            else ""
        )

    def judge(self, images: Tensor) -> Tensor:
        outputs: Tensor = self._judge(images)
        return outputs

    def loss_d(self, real_outputs: Tensor, fake_outputs: Tensor) -> Tensor:
        loss: Tensor = self._loss_d(real_outputs, fake_outputs)
        return loss

    def loss_g(self, fake_outputs: Tensor) -> Tensor:
        loss: Tensor = self._loss_g(fake_outputs)
        return loss

    def meters(
        self, losses: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor, Tensor], real: Tensor, fake: Tensor
    ) -> Tensor:
        found: Tensor = self._meters(losses, logits, real, fake)
        return found
