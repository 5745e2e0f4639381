"""Whether a run may go on from a checkpoint, and what is different when it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, ConfigError, to_dict
from pipeline.environment import cpu_name, versions
from pipeline.errors import OtherDataError

_IDENTITY = ("model.nz", "model.ngf", "model.ndf", "model.spectral_norm", "data.image_size", "data.nc", "run.seed")
"""Another value of these makes another run of it."""
_LATER = {"model.spectral_norm": False}
"""What is meant by the manifest of a checkpoint that is older than the setting."""
_LATER_LAYOUT = {"compress": "none", "overlap_g": False, "micro_batch": 0, "backend": "torch"}
"""The same of its layout."""


def value_of(settings: dict[str, Any], key: str) -> Any:
    """The value under `section.key`."""
    section, _, name = key.rpartition(".")
    return settings[section][name] if section else settings[name]


def identity(cfg: Config, fingerprint: str) -> dict[str, Any]:
    """What a resumed run must share with the checkpoint, as plain values."""
    found = {key: value_of(to_dict(cfg), key) for key in _IDENTITY}
    return found | {"data.image_size": list(cfg.data.size), "dataset": fingerprint}


def layout(
    cfg: Config,
    *,
    world_size: int,
    threads: int,
    precision: str,
    mode: str,
    decoder: str,
    cache: str,
    device: str,
    choices: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What results are exact for: the same of all these repeats a run bit for bit.

    Args:
        choices: which implementation does each operation, as Choices.layout gives it.
    """
    return {
        "world_size": world_size,
        "threads": threads,
        "device": device,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "torch": torch.__version__,
        "dali": next((v for k, v in versions().items() if "dali" in k), "") if decoder == "dali" else "",
        "precision": precision,
        "mode": mode,
        "channels_last": cfg.train.channels_last,
        "batch_size": cfg.train.batch_size,
        "decoder": decoder,
        "cache": cache,
        "jpeg_fancy_upsampling": cfg.data.jpeg_fancy_upsampling,
        "sync_batchnorm": cfg.distributed.sync_batchnorm,
        "compress": cfg.distributed.compress,
        "overlap_g": cfg.distributed.overlap_g,
        "micro_batch": cfg.train.micro_batch,
        "backend": cfg.optim.backend,
        "deterministic": cfg.run.deterministic,
        **choices,
    }


def choose(cfg: Config, run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that run.resume means; None: begin.

    Raises:
        StorageError: a path that holds no good checkpoint.
    """
    if cfg.run.resume == "none":
        return None
    own = checkpoints.newest(run, say)
    if cfg.run.resume == "auto":
        return own
    # The same command again goes on from where it came to, not from where it began.
    if own and own.manifest["begun_from"] == begun_from(cfg, None):
        return own
    return checkpoints.find(Path(cfg.run.resume), say)


def begun_from(cfg: Config, found: Checkpoint | None) -> str:
    """The path given as run.resume by which a run began, or that of the run it goes on from; empty: none."""
    if cfg.run.resume not in ("auto", "none"):
        return str(Path(cfg.run.resume).resolve())
    return str(found.manifest["begun_from"]) if found else ""


def check_identity(cfg: Config, fingerprint: str, found: Checkpoint, say: Callable[[str], None]) -> None:
    """Refuse a checkpoint of another run, unless run.force is set.

    Raises:
        ConfigError: a setting differs; the message names it.
        OtherDataError: the dataset differs.
    """
    theirs = _LATER | found.manifest["identity"]
    for key, mine in identity(cfg, fingerprint).items():
        if theirs.get(key) == mine:
            continue
        message = f"{key} is {mine}, but the checkpoint {found.folder} was made with {theirs.get(key)}"
        if key == "dataset":
            message = (
                f"data.dataroot {cfg.data.dataroot} (fingerprint {fingerprint[:12]}) is not the dataset of the "
                f"checkpoint {found.folder} (fingerprint {str(theirs.get(key))[:12]})"
            )
        if cfg.run.force:
            say(f"run.force: {message}")
            continue
        message += "; another run.dir begins a new run"
        if key in ("dataset", "run.seed"):  # networks of another shape cannot be loaded, forced or not
            message += ", --run.force true goes on all the same"
        raise OtherDataError(message) if key == "dataset" else ConfigError(message)


def differences(cfg: Config, layout_now: dict[str, Any], found: Checkpoint) -> Iterator[str]:
    """A line for each setting that changed since the checkpoint, and one where exactness is gone."""
    then = yaml.safe_load((found.folder / "config.yaml").read_text())
    now, defaults = to_dict(cfg), to_dict(Config())  # a setting younger than the checkpoint was at its default
    for section, value in now.items():
        keys = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        for key in keys:
            if key.startswith("run."):
                continue
            known = then.get(section, {}) if isinstance(value, dict) else then
            old = known.get(key.rpartition(".")[2], value_of(defaults, key))
            if old != value_of(now, key):
                yield f"changed since the checkpoint: {key} {old} -> {value_of(now, key)}"
    theirs = _LATER_LAYOUT | found.manifest["layout"]
    changed = [f"{k} {_then(theirs, k)} -> {v}" for k, v in layout_now.items() if _then(theirs, k) != v]
    if changed:
        yield f"the layout differs ({', '.join(changed)}): the same images follow, results are not promised to the bit"


def _then(layout: dict[str, Any], key: str) -> Any:
    """What a checkpoint's layout says; an operation that it does not speak of was torch's."""
    return layout.get(key, "torch" if key.startswith("kernels.") else None)
