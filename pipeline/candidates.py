"""What a run chooses among: the implementations of each operation that are to be had here, as calls that do it once.

Whatever is made for a measurement only is freed with it.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import language, native
from kernels.gather import gather
from kernels.normalize import normalize
from pipeline import augment, distributed, precision
from pipeline.assembly import Plan, build_step, make_networks
from pipeline.choices import Candidates, Choices
from pipeline.config import Config, ConfigError
from pipeline.decode import window_shape
from pipeline.distributed import Ranks
from pipeline.feed import Batch, can_normalise, gatherer_on_cpu
from pipeline.index import cache_folder
from pipeline.models import native_problem
from pipeline.step import Step
from pipeline.step_compiled import compile_problem

COMPILE_PAYS_IMAGES = 2_000_000
"""torch.compile takes about a minute on a GPU and saves a share of the time that the rest takes: not of a short run."""
_STEPS_BEFORE = {"cpu": 0, "cuda": 12}
"""Steps before the first one that a measurement asks for, which it does not time either: till all is compiled and
recorded."""
_IMAGES_TO_GATHER_FROM = 8192
_BYTES_TO_GATHER_FROM = 256 << 20
"""And no more than this, however large the images: many times what any cache of the processor holds."""


def settle(cfg: Config, plan: Plan, ranks: Ranks, choices: Choices) -> Plan:
    """The plan with an implementation for each operation; every rank calls it, and measures together with the others.

    Raises:
        ConfigError: a setting names an implementation that is not to be had here.
    """
    share = cfg.per_rank(ranks.world_size)
    size = f"{share}x{cfg.data.nc}x{cfg.data.size[0]}x{cfg.data.size[1]} {plan.precision}"
    wide = f"{size} ngf {cfg.model.ngf} ndf {cfg.model.ndf}"
    networks, problem = network_candidates(cfg, plan, ranks)
    if problem and ranks.device.type == "cpu":
        distributed.together(lambda: _refuse_native(cfg, problem))
        plan = dataclasses.replace(plan, reasons=(*plan.reasons, f"networks by torch: {problem}"))
    plan = dataclasses.replace(plan, networks=choices.pick("networks", wide, networks, cfg.kernels.networks))
    del networks  # and with them what was made to measure them
    layers: dict[str, Any] = {"batchnorm": cfg.kernels.batchnorm, "image_ends": cfg.kernels.image_ends}
    for operation, setting in layers.items():
        found = choices.pick(operation, wide, layer_candidates(cfg, plan, ranks, operation), setting)
        plan = dataclasses.replace(plan, **{operation: found})  # type: ignore[arg-type]
    from_cache = f"{size} from {plan.cache} on {ranks.device.type}"
    gather_by = choices.pick("gather", from_cache, gathers(cfg, plan, ranks.device, share), cfg.kernels.gather)
    plan = dataclasses.replace(plan, gather=gather_by)
    if cfg.train.mode != "auto":
        return plan
    done_by = f"networks {plan.networks} batchnorm {plan.batchnorm} image_ends {plan.image_ends}"
    if cfg.optim.backend != "torch":
        done_by += f" adam {cfg.optim.backend}"
    mode, why = settle_mode(cfg, plan, ranks, choices, f"{wide} {ranks.device.type} {done_by}")
    return dataclasses.replace(plan, mode=mode, reasons=(*plan.reasons, f"mode {mode}: {why}"))


def _refuse_native(cfg: Config, problem: str) -> None:
    if cfg.kernels.networks == "native":
        raise ConfigError(f"kernels.networks must be auto or torch here, since {problem}, got 'native'")


def settle_mode(cfg: Config, plan: Plan, ranks: Ranks, choices: Choices, key: str) -> tuple[str, str]:
    """What train.mode auto means here, and why, as a sentence.

    On a GPU each mode's step is measured, on rank 0 with its share of a batch and without the other ranks.  On a CPU
    nothing is, since compiling takes longer than a small run: it is eager unless kernels.choices says otherwise.
    """
    arranged = {"train.micro_batch": cfg.train.micro_batch, "distributed.overlap_g": cfg.distributed.overlap_g}
    for setting, value in arranged.items():
        if value:
            return "eager", f"the only one that {setting} works with."
    names = ["eager"]
    if not cfg.distributed.sync_batchnorm:
        if ranks.device.type == "cuda" and cfg.optim.backend != "apex":
            names.append("graph")
        can_compile = plan.networks == "torch" and not compile_problem(ranks.device)
        if can_compile and (plan.total_images >= COMPILE_PAYS_IMAGES or ranks.device.type != "cuda"):
            names.append("compile")
    if ranks.device.type != "cuda":
        mode = choices.recall("mode", key, names, "on a CPU, where no other is known to be faster")
        return mode, choices.why("mode", key)
    mode = choices.pick("mode", key, {name: _steps_of(cfg, plan, ranks, mode=name) for name in names})
    gc.collect()  # a graph and its step hold each other
    torch.cuda.empty_cache()
    return mode, choices.why("mode", key)


def _steps_of(cfg: Config, plan: Plan, ranks: Ranks, **changed: Any) -> Callable[[], None]:
    """A call that does one step of a training of its own, by the plan with something changed, on noise."""
    share = cfg.per_rank(ranks.world_size)
    made: list[tuple[Step, Tensor, Tensor]] = []
    seen = itertools.count(_STEPS_BEFORE[ranks.device.type])

    def one_step() -> None:
        if not made:  # by the rank that measures, when it does
            alone = dataclasses.replace(ranks, rank=0, world_size=1, local_world_size=1)
            random = torch.Generator(ranks.device).manual_seed(0)
            pixels = (share, *cfg.data.size, cfg.data.nc)
            images = torch.randint(0, 256, pixels, generator=random, dtype=torch.uint8, device=ranks.device)
            latents = torch.randn(share, cfg.model.nz, generator=random, device=ranks.device)
            step = build_step(cfg, dataclasses.replace(plan, **changed), alone)
            made.append((step, images, latents))
            for i in range(_STEPS_BEFORE[ranks.device.type]):
                step(images, latents, i * share, share)
        step, images, latents = made[0]
        step(images, latents, next(seen) * share, share)  # on and on: what is due now and then is due now as well

    return one_step


def _nothing() -> None:
    """What an operation that has one implementation only is timed by: it is not."""


def network_candidates(cfg: Config, plan: Plan, ranks: Ranks) -> tuple[Candidates, str]:
    """What can run the networks' layers in training, each as a whole step at this rank's size; and why no more can."""
    problem = _native_problem(cfg, plan, ranks)
    problem = next(filter(None, distributed.gather(problem)), "")  # what one rank lacks, none can have
    if problem:
        return {"torch": _nothing}, problem
    return {name: _steps_of(cfg, plan, ranks, networks=name) for name in ("torch", "native")}, ""


def _native_problem(cfg: Config, plan: Plan, ranks: Ranks) -> str:
    """Why the C kernels cannot train these networks here; empty: they can, and are loaded."""
    if ranks.device.type != "cpu" or plan.precision not in ("bf16", "fp32"):
        return "the C kernels are for bf16 and fp32 on a CPU"
    if plan.mode == "compile":
        return "torch.compile does not see into the C kernels"
    if cfg.loss.r1 or cfg.loss.gradient_penalty:
        return "the C kernels have no second derivative, which a penalty takes"
    at_a_time, dtype = cfg.train.micro_batch or cfg.per_rank(ranks.world_size), precision.dtype_of(plan.precision)
    problem = native_problem(*make_networks(cfg, torch.device("meta")), at_a_time, dtype)
    if problem:
        return f"the C kernels cannot run them: {problem}"

    def load() -> str:
        try:
            native.load(cache_folder(cfg.data), dtype)
        except native.NativeError as error:
            return f"the C kernels are not to be had: {error}"
        return ""

    return distributed.leader_first(ranks, load)


def layer_candidates(cfg: Config, plan: Plan, ranks: Ranks, operation: str) -> Candidates:
    """What can compute some layers with their activations in training, each as a whole step; where the mode is not
    settled yet, in a graph, where nothing but the kernels takes time.

    Args:
        operation: the plan's field that says what computes them.
    """
    if ranks.device.type != "cuda" or not language.AVAILABLE or cfg.distributed.sync_batchnorm:
        return {"torch": _nothing}
    mode = "graph" if cfg.train.mode == "auto" else cfg.train.mode
    return {name: _steps_of(cfg, plan, ranks, **{operation: name, "mode": mode}) for name in ("torch", "triton")}


def _gathered_from(cfg: Config, share: int) -> tuple[int, ...]:
    """Shape of the decoded images of no meaning that ways to gather a batch are measured on."""
    window = window_shape(cfg.data)
    count = min(_IMAGES_TO_GATHER_FROM, max(share, _BYTES_TO_GATHER_FROM // math.prod(window)))
    return (count, *window)


def gathers(cfg: Config, plan: Plan, device: torch.device, share: int) -> Candidates:
    """Ways to make a batch out of decoded images on the device, each from there to [-1, 1]."""
    fits = can_normalise(cfg.data, device, cache=plan.cache, channels_last=cfg.train.channels_last)
    if not fits or (device.type == "cuda" and not language.AVAILABLE):
        return {"torch": _nothing}
    if device.type == "cpu":
        return _gathers_on_cpu(cfg, plan, share)
    dtype, size = precision.dtype_of(plan.precision), cfg.data.size
    made: list[tuple[Tensor, augment.Places]] = []
    params = augment.parameters(cfg.data, 0, np.arange(share))

    def source() -> tuple[Tensor, augment.Places]:
        if not made:
            random = torch.Generator(device).manual_seed(0)
            shape = _gathered_from(cfg, share)
            images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8, device=device)
            items = np.random.default_rng(0).integers(shape[0], size=share)
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


def _gathers_on_cpu(cfg: Config, plan: Plan, share: int) -> Candidates:
    dtype, size = precision.dtype_of(plan.precision), cfg.data.size
    params = augment.parameters(cfg.data, 0, np.arange(share))
    made: list[tuple[np.ndarray, Batch]] = []

    def source() -> tuple[np.ndarray, Batch]:
        if not made:
            random = np.random.default_rng(0)
            shape = _gathered_from(cfg, share)
            images = random.integers(256, size=shape, dtype=np.uint8)
            made.append((images, Batch(random.integers(shape[0], size=share), params)))
        return made[0]

    def by_torch() -> None:
        images, batch = source()
        normalize(torch.from_numpy(augment.take_numpy(images, batch.items, params, size)), dtype)

    def by_native() -> None:
        images, batch = source()
        gatherer_on_cpu(torch.from_numpy(images), cfg.data, dtype)(batch)

    return {"torch": by_torch, "native": by_native}
