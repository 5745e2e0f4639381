"""From settings to the parts that train: every `auto` resolved, the networks, their step, their wrapping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline import distributed, precision
from pipeline.cache import cache_kind
from pipeline.config import Config, ConfigError
from pipeline.decode import Decoder, choose_decoder
from pipeline.distributed import Ranks
from pipeline.index import Dataset
from pipeline.micro_batches import MicroBatchStep
from pipeline.models import Discriminator, Generator, Kernels, initialise
from pipeline.optimisers import require_backend
from pipeline.overlap import OverlappedStep
from pipeline.players import make_players
from pipeline.precision import Precision
from pipeline.schedule import Schedule
from pipeline.step import FastStep, ReferenceStep, Step
from pipeline.step_compiled import CompiledStep, compile_problem
from pipeline.step_graph import GraphStep


@dataclass(frozen=True)
class Plan:
    """What the settings come to on this machine with this dataset."""

    decoder: Decoder
    cache: Literal["none", "host", "device"]
    precision: Precision
    mode: str
    reasons: tuple[str, ...]
    """A sentence for each choice that was made automatically."""
    num_steps: int
    total_images: int
    networks: str = "torch"
    batchnorm: Kernels = "torch"
    image_ends: Kernels = "torch"
    gather: str = "torch"
    """What does these operations, as under kernels; torch until `candidates.settle` has chosen."""


def make_plan(cfg: Config, dataset: Dataset, ranks: Ranks) -> Plan:
    """Resolve every `auto`; one rank does it for all, since what is free may differ from one moment to the next.

    Raises:
        ConfigError: this machine cannot do what a setting asks for, or one setting not what another asks for.
    """
    _refuse_what_does_not_go_together(cfg)
    require_mode(cfg, ranks.device)
    require_backend(cfg.optim.backend, ranks.device)
    distributed.require_compression(cfg.distributed, ranks)
    decoder, why_decoder = choose_decoder(cfg.data)
    cache, why_cache = cache_kind(cfg.data, dataset, ranks.device, decoder=decoder)
    arithmetic = precision.resolve(cfg.precision, ranks.device)
    mode = "eager" if cfg.train.mode == "auto" else cfg.train.mode  # till `candidates.settle` has chosen
    num_steps = cfg.train.num_steps(len(dataset))
    reasons = (f"decoder {decoder}: {why_decoder}", f"cache {cache}: {why_cache}", f"precision {arithmetic}")
    return Plan(decoder, cache, arithmetic, mode, reasons, num_steps, num_steps * cfg.train.batch_size)


def _refuse_what_does_not_go_together(cfg: Config) -> None:
    """
    Raises:
        ConfigError: the losses and penalties cannot train these networks, or the step cannot be arranged so.
    """
    for key, value in (
        ("distributed.overlap_g", cfg.distributed.overlap_g),
        ("train.micro_batch", cfg.train.micro_batch),
    ):
        if value and cfg.train.mode not in ("auto", "eager"):
            raise ConfigError(f"train.mode must be eager with {key}, got {cfg.train.mode!r}")
    if cfg.distributed.overlap_g and cfg.optim.backend == "triton":  # G's average follows an update that comes later
        raise ConfigError("optim.backend must be torch or apex with distributed.overlap_g, got 'triton'")
    if cfg.distributed.overlap_g and cfg.train.micro_batch:
        raise ConfigError("distributed.overlap_g must be false with train.micro_batch, got True")
    penalty = next((key for key in ("gradient_penalty", "r1") if getattr(cfg.loss, key)), "")
    if penalty and cfg.distributed.sync_batchnorm:  # torch's has no second derivative (pytorch#61222)
        raise ConfigError(f"distributed.sync_batchnorm must be false with loss.{penalty}, got True")
    if cfg.loss.kind == "wasserstein" and not (penalty or cfg.model.spectral_norm):
        raise ConfigError(
            "loss.kind wasserstein must have D's slope bounded, by loss.gradient_penalty (10 is usual), loss.r1 or "
            "model.spectral_norm, got none of them"
        )


def require_mode(cfg: Config, device: torch.device) -> None:
    """
    Raises:
        ConfigError: train.mode cannot be had with this device or these settings.
    """
    mode = cfg.train.mode
    if mode == "graph" and device.type != "cuda":
        raise ConfigError("train.mode must be auto, eager, reference or compile on a CPU, got 'graph'")
    if mode == "graph" and cfg.optim.backend == "apex":
        raise ConfigError("optim.backend must be torch or triton with train.mode graph, got 'apex'")
    if mode == "compile" and compile_problem(device):
        raise ConfigError(f"train.mode must be another than compile here: {compile_problem(device)}")
    if mode in ("compile", "graph") and cfg.distributed.sync_batchnorm:
        raise ConfigError(f"train.mode must be auto, eager or reference with distributed.sync_batchnorm, got {mode!r}")


def make_networks(cfg: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    """Both networks with torch's initial weights; on the meta device, with none."""
    with device:
        generator = Generator(cfg.model.nz, cfg.model.ngf, cfg.data.nc, *cfg.data.size)
        discriminator = Discriminator(cfg.model.ndf, cfg.data.nc, *cfg.data.size, spectral_norm=cfg.model.spectral_norm)
    return generator, discriminator


def build_networks(cfg: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    """Both networks with their initial weights, the same on every rank, on the device."""
    random = torch.Generator().manual_seed(cfg.run.seed)
    generator, discriminator = make_networks(cfg, torch.device("cpu"))
    for network in (generator, discriminator):
        initialise(network, random)
        network.to(device=device)
        if cfg.train.channels_last:
            network.to(memory_format=torch.channels_last)
    return generator, discriminator


_NEVER = 1 << 30
"""Steps between the wrapper's own timings, else 100: a recorded step must not hold one."""

STEPS: dict[str, type[Step]] = {
    "eager": FastStep,
    "reference": ReferenceStep,
    "compile": CompiledStep,
    "graph": GraphStep,
}
"""By train.mode."""


def build_step(cfg: Config, plan: Plan, ranks: Ranks) -> Step:
    """The networks under their optimisers, wrapped for many ranks, in the arrangement of the plan."""
    generator, discriminator = build_networks(cfg, ranks.device)
    for network in (generator, discriminator):
        network.native = precision.dtype_of(plan.precision) if plan.networks == "native" else None
        network.batchnorm_act = plan.batchnorm
        network.image_ends = plan.image_ends
    if cfg.distributed.sync_batchnorm:
        distributed.synchronise_batchnorm(generator, ranks)
        distributed.synchronise_batchnorm(discriminator, ranks)
    lr = cfg.optim.scaled_lr(cfg.train.batch_size)
    players = make_players(generator, discriminator, cfg.optim, lr=lr, precision=plan.precision)
    kind = _kind(cfg, plan, ranks)
    return kind(
        players,
        plan.precision,
        channels_last=cfg.train.channels_last,
        ema_half_life_images=cfg.optim.ema_half_life_images,
        # SyncBatchNorm knows no groups: real and fake then go one after the other.
        joint=ranks.device.type == "cuda" and not cfg.distributed.sync_batchnorm and kind is not OverlappedStep,
        guarded=cfg.watch.skip_non_finite,
        min_loss_scale=cfg.watch.min_loss_scale,
        loss=cfg.loss,
        d_input=cfg.d_input,
        schedule=Schedule(cfg.optim.lr_decay, cfg.optim.lr_decay_from, plan.total_images),
        seed=cfg.run.seed,
    )


def _kind(cfg: Config, plan: Plan, ranks: Ranks) -> Callable[..., Step]:
    """The arrangement of the step that these settings come to."""
    if cfg.train.micro_batch and cfg.train.micro_batch < cfg.per_rank(ranks.world_size):
        return functools.partial(MicroBatchStep, micro_batch=cfg.train.micro_batch)
    if cfg.distributed.overlap_g and ranks.world_size > 1:
        return OverlappedStep
    return STEPS[plan.mode]


def wrap_players(step: Step, ranks: Ranks, cfg: Config) -> None:
    """Put both networks under DistributedDataParallel, where there are several ranks."""
    if ranks.world_size > 1:
        players = step.players
        if cfg.distributed.overlap_g:
            players.late = distributed.LateReduction(ranks, cfg.distributed.compress)
        with step.apart():
            for name, late in (("generator", players.late), ("discriminator", None)):
                wrapped: Any = distributed.wrap(players.bare(name), ranks, cfg.distributed, late)
                if isinstance(step, GraphStep):
                    wrapped._set_ddp_runtime_logging_sample_rate(_NEVER)
                players.parallel[name] = wrapped
