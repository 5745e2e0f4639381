"""The two networks with everything that a step changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config import OptimConfig
from pipeline.distributed import LateReduction
from pipeline.models import Discriminator, Generator
from pipeline.optimisers import make_adam
from pipeline.precision import Precision


@dataclass
class Players:
    """The two networks, what trains them and G's running average: everything a step changes."""

    generator: Generator
    discriminator: Discriminator
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    scaler_g: torch.amp.GradScaler
    scaler_d: torch.amp.GradScaler
    ema: dict[str, Tensor]
    """G's parameters averaged over images; empty where no average is kept."""
    parallel: dict[str, Any] = field(default_factory=dict)
    """`generator` and `discriminator` as wrapped for many ranks; empty on a single one."""
    late: LateReduction | None = None
    """G's gradients on their way to the other ranks, where distributed.overlap_g lets them travel on."""
    compiled: dict[str, Any] = field(default_factory=dict)
    """`generator` and `discriminator` compiled, which is then what is wrapped; empty where a step compiles nothing."""

    def bare(self, name: str) -> Any:
        """A network as it goes under DistributedDataParallel."""
        return self.compiled.get(name, getattr(self, name))

    def forward_g(self, latents: Tensor) -> Tensor:
        return self.parallel.get("generator", self.bare("generator"))(latents)

    def forward_d(self, images: Tensor, num_groups: int = 1) -> Tensor:
        return self.parallel.get("discriminator", self.bare("discriminator"))(images, num_groups)

    def learning_rates(self) -> dict[str, float]:
        """G's, and D's where it has one of its own.  Waits for the device where an optimiser keeps its own there."""
        of_g, of_d = (float(each.param_groups[0]["lr"]) for each in (self.optimizer_g, self.optimizer_d))
        return {"learning_rate": of_g} | ({"learning_rate_d": of_d} if of_d != of_g else {})


def make_players(
    generator: Generator, discriminator: Discriminator, cfg: OptimConfig, *, lr: float, precision: Precision
) -> Players:
    """Optimisers, scalers and the average for networks that already lie on their device in their memory format.

    Args:
        lr: G's learning rate at this batch size, and D's where it has none of its own; its own grows by the same rule.
    """
    lr_d = cfg.lr_d * (lr / cfg.lr) if cfg.lr_d else lr

    device = next(generator.parameters()).device.type
    scaled = precision == "fp16"
    ema = {k: p.detach().clone() for k, p in generator.named_parameters()} if cfg.ema_half_life_images else {}
    return Players(
        generator,
        discriminator,
        make_adam(generator.parameters(), cfg, lr, list(ema.values())),
        make_adam(discriminator.parameters(), cfg, lr_d),
        torch.amp.GradScaler(device, enabled=scaled),
        torch.amp.GradScaler(device, enabled=scaled),
        ema,
    )
