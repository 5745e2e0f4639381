"""launch/train.py: read the settings, train, end with an exit code that says how it went."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from pipeline import assembly, distributed, evaluating, sizes, trainer
from pipeline.choices import Choices, machine_facts
from pipeline.cli.options import Options, parse, to_yaml
from pipeline.config import ConfigError
from pipeline.errors import Preempted, StorageError, UserError
from pipeline.files import write_in_place_if_full
from pipeline.index import cache_folder, open_dataset
from pipeline.signals import end_with_parent
from pipeline.sources import require_named
from pipeline.tracker import require_wandb

OUTCOME = "DCGAN_OUTCOME"
"""Environment variable of launch/run.py: the folder where each rank says how it ended, since torchrun does not tell."""


def main(argv: list[str] | None = None) -> int:
    """Train; the exit code is 0 or that of the error, told in one line by rank 0.

    Under torchrun a preempted rank exits with 0: torchrun would take anything else for a crash and start it anew.
    """
    logging.basicConfig(
        level=logging.INFO if distributed.rank_from_environment() == 0 else logging.ERROR, format="%(message)s"
    )
    if distributed.under_torchrun():
        end_with_parent()
        get_error_handler().initialize()
    leave_outcome("running", None, "")
    try:
        code = train(sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        leave_outcome("failed", 1, f"{type(error).__name__}: {error}")
        raise
    return 0 if code == Preempted.exit_code and distributed.under_torchrun() else code


def train(argv: list[str]) -> int:
    """The exit code of a training by these words."""
    started = False
    leads = distributed.rank_from_environment() == 0
    try:
        options = parse(argv)
        options.config.per_rank(int(os.environ.get("WORLD_SIZE", 1)))  # before any process group
        require_named(options.config.data.dataroot)
        require_wandb(options.config.log)
        if options.dry_run:
            if leads:
                print(describe(options))
            return 0
        started = True
        trainer.run(options.config, to_yaml(options.config), options.run_folder)
    except (ConfigError, UserError) as error:
        # What all ranks raise is told once; what one of them meets alone, a bad file say, only it can tell.
        message = " ".join(str(error).split())
        if leads or (started and not error.shared):
            print(f"train.py: error: {message}", file=sys.stderr)
        leave_outcome("failed", error.exit_code, message)
        return error.exit_code
    except Preempted as stop:
        saved = f" after {stop.images_seen} images, saved" if stop.images_seen else ""
        if leads:
            print(f"train.py: stopped by {stop.reason}{saved}; the same command goes on", file=sys.stderr)
        leave_outcome("preempted", stop.exit_code, stop.reason)
        return stop.exit_code
    leave_outcome("finished", 0, "")
    return 0


def leave_outcome(state: str, exit_code: int | None, reason: str) -> None:
    """Tell launch/run.py how this rank fares, where it asks."""
    folder = os.environ.get(OUTCOME)
    if not folder:
        return
    # By the local rank: the global one may change when hosts come back, and what it said before would stay.
    path = Path(folder, f"{os.environ.get('LOCAL_RANK', 0)}.json")
    told: dict[str, Any] = {"rank": distributed.rank_from_environment()}
    told |= {"state": state, "exit_code": exit_code, "reason": reason, "restart": distributed.restart_count()}
    with contextlib.suppress(OSError, StorageError):  # what was said before must do
        write_in_place_if_full(path, json.dumps(told | {"pid": os.getpid()}))


def describe(options: Options) -> str:
    """What --dry-run prints: the settings, the networks, the dataset, the steps, the memory."""
    cfg = options.config
    dataset = open_dataset(cfg.data)
    ranks = distributed.from_environment()
    plan = assembly.make_plan(cfg, dataset, ranks)
    evaluating.open_evaluation(cfg, dataset, ranks, decoder=plan.decoder, cached=None)  # raises what training would
    world_size = ranks.world_size
    threads = distributed.num_threads(cfg.distributed, ranks.local_world_size)
    choices = Choices(
        ranks.device,
        cache=cache_folder(cfg.data),
        run=options.run_folder,
        overrides=cfg.kernels.choices,
        machine=machine_facts(ranks.device, threads),
    )
    networks = sizes.networks_of(cfg)
    memory = sizes.memory_of(cfg, networks, plan.precision, cfg.per_rank(world_size))
    lines = [
        to_yaml(cfg).rstrip(),
        "---",
        f"run folder            {options.run_folder}",
        f"dataset               {len(dataset)} images an epoch, {len(dataset.index.rejected)} files left out, "
        f"fingerprint {dataset.index.fingerprint[:12]}",
        *(f"{reason.split(' ')[0]:<21} {reason.split(' ', 1)[1]}" for reason in plan.reasons),
        f"step mode             {plan.mode}",
        *(f"kernels               {line}" for line in choices.lines() or ["measured at the first start"]),
        f"generator             {networks.generator:,} parameters",
        f"discriminator         {networks.discriminator:,} parameters",
        f"arithmetic            {networks.flops / 1e6:,.1f} MFLOP an image and step",
        f"ranks                 {world_size}, {cfg.per_rank(world_size)} images of each batch on each",
        f"steps                 {plan.num_steps:,} of {cfg.train.batch_size}: {plan.total_images:,} images, "
        f"{plan.total_images / len(dataset):.2f} epochs",
        f"learning rate         {cfg.optim.scaled_lr(cfg.train.batch_size):g}",
        f"evaluations           {evaluating.plan_in_words(cfg, plan.total_images)}",
        f"memory a rank         about {memory.total / 2**30:.2f} GiB: weights and optimisers "
        f"{memory.states / 2**30:.2f}, activations {memory.activations / 2**30:.2f}; Python and libraries come on top",
    ]
    return "\n".join(lines)
