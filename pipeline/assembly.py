"""From settings to the parts that train: every `auto` resolved, the networks, their step, their wrapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels import native
from pipeline import distributed, precision
from pipeline.cache import cache_kind
from pipeline.choices import Candidates, Choices
from pipeline.config import Config, ConfigError
from pipeline.decode import Decoder, choose_decoder
from pipeline.distributed import Ranks
from pipeline.index import Dataset, cache_folder
from pipeline.models import Discriminator, Generator, initialise, native_problem
from pipeline.precision import Precision
from pipeline.schedule import Schedule
from pipeline.step import FastStep, Players, ReferenceStep, Step, make_players


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
    batchnorm: str = "torch"
    gather: str = "torch"
    """What does these operations, as under kernels; torch until `settle` has chosen."""


def make_plan(cfg: Config, dataset: Dataset, ranks: Ranks) -> Plan:
    """Resolve every `auto`; one rank does it for all, since what is free may differ from one moment to the next.

    Raises:
        ConfigError: this machine cannot do what a setting asks for, or one setting not what another asks for.
    """
    _refuse_what_does_not_go_together(cfg)
    decoder, why_decoder = choose_decoder(cfg.data)
    cache, why_cache = cache_kind(cfg.data, dataset, ranks.device, decoder=decoder)
    arithmetic = precision.resolve(cfg.precision, ranks.device)
    mode = "eager" if cfg.train.mode == "auto" else cfg.train.mode
    num_steps = cfg.train.num_steps(len(dataset))
    reasons = (f"decoder {decoder}: {why_decoder}", f"cache {cache}: {why_cache}", f"precision {arithmetic}")
    return Plan(decoder, cache, arithmetic, mode, reasons, num_steps, num_steps * cfg.train.batch_size)


def settle(cfg: Config, plan: Plan, ranks: Ranks, choices: Choices) -> Plan:
    """The plan with an implementation for each operation; every rank calls it, and measures together with the others.

    Raises:
        ConfigError: a setting names an implementation that is not to be had here.
    """
    size = f"{cfg.per_rank(ranks.world_size)}x{cfg.data.nc}x{cfg.data.size[0]}x{cfg.data.size[1]} {plan.precision}"
    wide = f"{size} ngf {cfg.model.ngf} ndf {cfg.model.ndf}"
    networks, problem = _network_candidates(cfg, plan, ranks)
    reasons = plan.reasons
    if problem and plan.precision == "bf16" and ranks.device.type == "cpu":
        if cfg.kernels.networks == "native":
            raise ConfigError(f"kernels.networks must be auto or torch here, since {problem}, got 'native'")
        reasons += (f"networks by torch: {problem}",)
    return dataclasses.replace(
        plan,
        reasons=reasons,
        networks=choices.pick("networks", wide, networks, cfg.kernels.networks),
        batchnorm=choices.pick("batchnorm", wide, {"torch": _nothing}, cfg.kernels.batchnorm),
        gather=choices.pick("gather", size, {"torch": _nothing}, cfg.kernels.gather),
    )


def _network_candidates(cfg: Config, plan: Plan, ranks: Ranks) -> tuple[Candidates, str]:
    """What can run the networks' layers in training, each as a whole step at this rank's size; and why no more can."""
    problem = _native_problem(cfg, plan, ranks)
    if problem:
        return {"torch": _nothing}, problem

    def candidate(networks: Literal["torch", "native"]) -> Callable[[], None]:
        made: list[Callable[[], object]] = []

        def step() -> None:
            if not made:  # by the rank that measures, when it does
                made.append(_trial(cfg, dataclasses.replace(plan, networks=networks), ranks))
            made[0]()

        return step

    return {"torch": candidate("torch"), "native": candidate("native")}, ""


def _native_problem(cfg: Config, plan: Plan, ranks: Ranks) -> str:
    """Why the AMX kernels cannot train these networks here; empty: they can, and are loaded."""
    if ranks.device.type != "cpu" or plan.precision != "bf16":
        return "the AMX kernels are for bf16 on a CPU"
    if cfg.loss.r1 or cfg.loss.gradient_penalty:
        return "the AMX kernels have no second derivative, which a penalty takes"
    problem = native_problem(*_networks(cfg, torch.device("meta")), cfg.per_rank(ranks.world_size))
    if problem:
        return f"the AMX kernels cannot run them: {problem}"

    def load() -> str:
        try:
            native.load(cache_folder(cfg.data))
        except native.NativeError as error:
            return f"the AMX kernels are not to be had: {error}"
        return ""

    return distributed.leader_first(ranks, load)


def _trial(cfg: Config, plan: Plan, ranks: Ranks) -> Callable[[], object]:
    """A step of networks of its own, on images and latents of no meaning."""
    step = build_step(cfg, plan, ranks)
    random = torch.Generator().manual_seed(0)
    count = cfg.per_rank(ranks.world_size)
    images = torch.randint(0, 256, (count, *cfg.data.size, cfg.data.nc), generator=random, dtype=torch.uint8)
    latents = torch.randn(count, cfg.model.nz, generator=random)
    images, latents = images.to(ranks.device), latents.to(ranks.device)
    return lambda: step(images, latents, 0, count)


def _nothing() -> None:
    """What an operation that has one implementation only is timed by: it is not."""


def _refuse_what_does_not_go_together(cfg: Config) -> None:
    """
    Raises:
        ConfigError: the losses and penalties cannot train these networks.
    """
    penalty = next((key for key in ("gradient_penalty", "r1") if getattr(cfg.loss, key)), "")
    if penalty and cfg.distributed.sync_batchnorm:  # torch's has no second derivative (pytorch#61222)
        raise ConfigError(f"distributed.sync_batchnorm must be false with loss.{penalty}, got True")
    if cfg.loss.kind == "wasserstein" and not (penalty or cfg.model.spectral_norm):
        raise ConfigError(
            "loss.kind wasserstein must have D's slope bounded, by loss.gradient_penalty (10 is usual), loss.r1 or "
            "model.spectral_norm, got none of them"
        )


def _networks(cfg: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    with device:
        generator = Generator(cfg.model.nz, cfg.model.ngf, cfg.data.nc, *cfg.data.size)
        discriminator = Discriminator(cfg.model.ndf, cfg.data.nc, *cfg.data.size, spectral_norm=cfg.model.spectral_norm)
    return generator, discriminator


def build_networks(cfg: Config, device: torch.device) -> tuple[Generator, Discriminator]:
    """Both networks with their initial weights, the same on every rank, on the device."""
    random = torch.Generator().manual_seed(cfg.run.seed)
    generator, discriminator = _networks(cfg, torch.device("cpu"))
    for network in (generator, discriminator):
        initialise(network, random)
        network.to(device=device)
        if cfg.train.channels_last:
            network.to(memory_format=torch.channels_last)
    return generator, discriminator


def build_step(cfg: Config, plan: Plan, ranks: Ranks) -> Step:
    """The networks under their optimisers, wrapped for many ranks, in the arrangement of the plan."""
    generator, discriminator = build_networks(cfg, ranks.device)
    generator.native = discriminator.native = plan.networks == "native"
    if cfg.distributed.sync_batchnorm:
        distributed.synchronise_batchnorm(generator, ranks)
        distributed.synchronise_batchnorm(discriminator, ranks)
    lr = cfg.optim.scaled_lr(cfg.train.batch_size)
    players = make_players(generator, discriminator, cfg.optim, lr=lr, precision=plan.precision)
    kind = ReferenceStep if plan.mode == "reference" else FastStep
    return kind(
        players,
        plan.precision,
        channels_last=cfg.train.channels_last,
        ema_half_life_images=cfg.optim.ema_half_life_images,
        # SyncBatchNorm knows no groups: real and fake then go one after the other.
        joint=ranks.device.type == "cuda" and not cfg.distributed.sync_batchnorm,
        guarded=cfg.watch.skip_non_finite,
        min_loss_scale=cfg.watch.min_loss_scale,
        loss=cfg.loss,
        d_input=cfg.d_input,
        schedule=Schedule(cfg.optim.lr_decay, cfg.optim.lr_decay_from, plan.total_images),
        seed=cfg.run.seed,
    )


def wrap_players(players: Players, ranks: Ranks, cfg: Config) -> None:
    """Put both networks under DistributedDataParallel, where there are several ranks."""
    if ranks.world_size > 1:
        for name in ("generator", "discriminator"):
            players.parallel[name] = distributed.wrap(getattr(players, name), ranks, cfg.distributed)
