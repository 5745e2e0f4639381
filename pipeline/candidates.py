"""What a run chooses among: the implementations of each operation that are to be had here, as calls that do it once.

Whatever is made for a measurement only is freed with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import language
from kernels.gather import gather
from kernels.normalize import normalize
from pipeline import augment, precision
from pipeline.assembly import Plan, build_step
from pipeline.choices import Candidates, Choices
from pipeline.config import Config
from pipeline.decode import window_shape
from pipeline.distributed import Ranks
from pipeline.feed import can_normalise
from pipeline.step import Step
from pipeline.step_compiled import compile_problem

COMPILE_PAYS_IMAGES = 2_000_000
"""torch.compile takes about a minute on a GPU and saves a share of the time that the rest takes: not of a short run."""
_STEPS_BEFORE = 12
"""Steps of a mode that are not timed: till all is compiled and recorded."""
_IMAGES_TO_GATHER_FROM = 8192


def settle(cfg: Config, plan: Plan, ranks: Ranks, choices: Choices) -> Plan:
    """The plan with an implementation for each operation; every rank calls it, and measures together with the others.

    Raises:
        ConfigError: a setting names an implementation that is not to be had here.
    """
    share = cfg.per_rank(ranks.world_size)
    size = f"{share}x{cfg.data.nc}x{cfg.data.size[0]}x{cfg.data.size[1]} {plan.precision}"
    wide = f"{size} ngf {cfg.model.ngf} ndf {cfg.model.ndf}"
    from_cache = f"{size} from {plan.cache} on {ranks.device.type}"
    plan = dataclasses.replace(
        plan,
        networks=choices.pick("networks", wide, {"torch": _nothing}, cfg.kernels.networks),
        batchnorm=choices.pick("batchnorm", wide, {"torch": _nothing}, cfg.kernels.batchnorm),
        gather=choices.pick("gather", from_cache, gathers(cfg, plan, ranks.device, share), cfg.kernels.gather),
    )
    if cfg.train.mode != "auto":
        return plan
    mode, why = settle_mode(cfg, plan, ranks, choices, f"{wide} {ranks.device.type}")
    return dataclasses.replace(plan, mode=mode, reasons=(*plan.reasons, f"mode {mode}: {why}"))


def settle_mode(cfg: Config, plan: Plan, ranks: Ranks, choices: Choices, key: str) -> tuple[str, str]:
    """What train.mode auto means here, and why, as a sentence.

    On a GPU each mode's step is measured, on rank 0 with its share of a batch and without the other ranks.  On a CPU
    nothing is, since compiling takes longer than a small run; what a benchmark has found there before counts.
    """
    names = ["eager"]
    if not cfg.distributed.sync_batchnorm:
        if ranks.device.type == "cuda":
            names.append("graph")
        if not compile_problem(ranks.device) and (plan.total_images >= COMPILE_PAYS_IMAGES or names == ["eager"]):
            names.append("compile")
    if ranks.device.type != "cuda":
        found = choices.recall("mode", key, names)
        return found or "eager", choices.why("mode", key) or "on a CPU, unless another is measured to be faster."
    mode = choices.pick("mode", key, {name: _steps_of(name, cfg, plan, ranks) for name in names})
    torch.cuda.empty_cache()  # of the modes that lost
    return mode, choices.why("mode", key)


def _steps_of(mode: str, cfg: Config, plan: Plan, ranks: Ranks) -> Callable[[], None]:
    """A call that does one step of a training of its own, on noise."""
    share = cfg.per_rank(ranks.world_size)
    made: list[tuple[Step, Tensor, Tensor]] = []

    def one_step() -> None:
        if not made:
            alone = dataclasses.replace(ranks, rank=0, world_size=1, local_world_size=1)
            random = torch.Generator(ranks.device).manual_seed(0)
            pixels = (share, *cfg.data.size, cfg.data.nc)
            images = torch.randint(0, 256, pixels, generator=random, dtype=torch.uint8, device=ranks.device)
            latents = torch.randn(share, cfg.model.nz, generator=random, device=ranks.device)
            step = build_step(cfg, dataclasses.replace(plan, mode=mode), alone)
            made.append((step, images, latents))
            for i in range(_STEPS_BEFORE):  # till all is compiled and recorded
                step(images, latents, i * share, share)
        step, images, latents = made[0]
        step(images, latents, _STEPS_BEFORE * share, share)

    return one_step


def _nothing() -> None:
    """What an operation that has one implementation only is timed by: it is not."""


def gathers(cfg: Config, plan: Plan, device: torch.device, share: int) -> Candidates:
    """Ways to make a batch out of decoded images on the device, each from there to [-1, 1]."""
    fits = can_normalise(cfg.data, device, cache=plan.cache, channels_last=cfg.train.channels_last)
    if not fits or not language.AVAILABLE:
        return {"torch": _nothing}
    dtype, size = precision.dtype_of(plan.precision), cfg.data.size
    made: list[tuple[Tensor, augment.Places]] = []
    params = augment.parameters(cfg.data, 0, np.arange(share))

    def source() -> tuple[Tensor, augment.Places]:
        if not made:
            random = torch.Generator(device).manual_seed(0)
            shape = (_IMAGES_TO_GATHER_FROM, *window_shape(cfg.data))
            images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8, device=device)
            items = np.random.default_rng(0).integers(_IMAGES_TO_GATHER_FROM, size=share)
            packed = np.zeros((augment.NUM_PLACES, share), np.int64)
            augment.pack_places(items, params, packed)
            made.append((images, augment.unpack_places(torch.from_numpy(packed).to(device), params)))
        return made[0]

    def by_torch() -> None:
        images, places = source()
        normalize(augment.take_device(images, places.rows, params, size, places), dtype)

    def by_triton() -> None:
        images, places = source()
        gather(images, places.rows, dtype, flip=places.flip, top=places.top, left=places.left, size=size)

    return {"torch": by_torch, "triton": by_triton}
