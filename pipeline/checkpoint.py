"""Checkpoints that prove themselves: a folder written aside, synced, given a manifest of SHA-256 sums, then renamed.

What does not match its manifest does not exist: the loader walks back to the newest folder that does.  Files hold
tensors and plain values only and are read with weights_only=True.

    RUN/checkpoints/images-000025600/
        state.pt        both networks, both optimisers, both scalers, G's average, every rank's BatchNorm statistics
        config.yaml     the resolved settings
        manifest.json   sums and sizes of the files, images seen, what a resumed run must share, the layout; its own sum
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from pipeline.config import Config, ConfigError, from_dict
from pipeline.errors import StorageError
from pipeline.files import where_it_may_be
from pipeline.models import Generator
from pipeline.players import Players

FORMAT = 1
BEST = "best.json"
"""In checkpoints/: names the one that pruning spares as the best."""
_NAME = re.compile(r"images-\d{9,}")
State = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files match its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.manifest["images_seen"])


def folder_of(run: Path, images_seen: int) -> Path:
    return run / "checkpoints" / f"images-{images_seen:09d}"


def buffers_of(players: Players) -> Tensor:
    """(B,) float32 on the CPU: this rank's BatchNorm running means and variances, G's then D's, end to end."""
    networks = (players.generator, players.discriminator)
    values = [b.detach().float().flatten() for n in networks for b in n.buffers() if b.is_floating_point()]
    return torch.cat(values).cpu()


def _set_buffers(players: Players, values: Tensor) -> None:
    place = 0
    for network in (players.generator, players.discriminator):
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(values[place : place + buffer.numel()].view_as(buffer))
                place += buffer.numel()
    assert place == values.numel()


def _copied(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """The same plain values with tensors that training cannot change any more."""
    if isinstance(value, Tensor):
        return take(value.detach())
    if isinstance(value, dict):
        return {k: _copied(v, take) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v, take) for v in value]
    return value


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Its state with learning rates as plain numbers, wherever the step keeps them."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def snapshot(players: Players, rank_buffers: list[Tensor], take: Callable[[Tensor], Tensor] = _to_cpu) -> State:
    """Everything that changes during training, copied to the CPU.

    Args:
        rank_buffers: `buffers_of` of every rank, in rank order.
        take: copies a tensor.
    """
    parts = {
        "generator": players.generator.state_dict(),
        "discriminator": players.discriminator.state_dict(),
        "ema": players.ema,
        "optimizer_g": _optimizer_state(players.optimizer_g),
        "optimizer_d": _optimizer_state(players.optimizer_d),
        "scaler_g": players.scaler_g.state_dict(),
        "scaler_d": players.scaler_d.state_dict(),
    }
    state: State = _copied(parts, take)
    state["rank_buffers"] = rank_buffers
    return state


def restore(players: Players, state: State, rank: int, world_size: int) -> None:
    """Put a snapshot back.  At another world size every rank gets the mean of the statistics.

    The learning rate stays the one the optimisers were built with: it may change on resume, and so may the memory
    format.  Adam's moments then take that of their parameter, since its fused kernel walks both as flat memory.
    """
    restore_weights(players, state)
    for optimizer, name in ((players.optimizer_g, "optimizer_g"), (players.optimizer_d, "optimizer_d")):
        counted = ("params", "step")  # apex counts its steps here
        settings = [{k: v for k, v in group.items() if k not in counted} for group in optimizer.param_groups]
        # Before loading as well: torch brings the step counts to the device only for a group that says it is fused.
        groups = [theirs | kept for theirs, kept in zip(state[name]["param_groups"], settings, strict=True)]
        optimizer.load_state_dict(state[name] | {"param_groups": groups})
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)
        for parameter, moments in optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.empty_like(parameter).copy_(moments[key])
    for scaler, name in ((players.scaler_g, "scaler_g"), (players.scaler_d, "scaler_d")):
        if state[name] and scaler.is_enabled():
            scaler.load_state_dict(state[name])
    buffers = state["rank_buffers"]
    _set_buffers(players, buffers[rank] if len(buffers) == world_size else torch.stack(buffers).mean(0))


def restore_weights(players: Players, state: State) -> None:
    """Put back both networks and G's average only.

    Raises:
        StorageError: they are of other shapes.
    """
    try:
        players.generator.load_state_dict(state["generator"])
        players.discriminator.load_state_dict(state["discriminator"])
    except RuntimeError as error:
        raise StorageError(
            f"the checkpoint's networks do not fit this model: {str(error).splitlines()[-1].strip()}"
        ) from None
    live = dict(players.generator.named_parameters())
    for name, value in players.ema.items():
        value.copy_(state["ema"].get(name, live[name].detach()))


def remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that a kill in between leaves nothing that looks like one."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process left half written or half removed."""
    for pattern in (".images-*.partial", ".images-*.removed"):
        for folder in (run / "checkpoints").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)  # in the way of nothing, should it stay


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(
    run: Path, state: State, config_yaml: str, manifest: dict[str, Any], pause: Callable[[], None] = lambda: None
) -> Path:
    """Write one checkpoint and return its folder.

    Args:
        pause: called between its first file and the others; for tests.

    Raises:
        StorageError: the disk is full or cannot be written; nothing of the attempt stays.
    """
    final = folder_of(run, manifest["images_seen"])
    aside = final.with_name(f".{final.name}.partial")
    buffer = io.BytesIO()
    torch.save(state, buffer)  # into memory first: on a full disk torch.save raises an obscure RuntimeError
    files = {"state.pt": buffer.getvalue(), "config.yaml": config_yaml.encode()}
    sums = {k: {"sha256": hashlib.sha256(v).hexdigest(), "bytes": len(v)} for k, v in files.items()}
    whole = {"format": FORMAT, **manifest, "files": sums}
    text = json.dumps(whole | {"sha256": _sum_of(whole)}, indent=1)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, data in {**files, "manifest.json": text.encode()}.items():
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            pause()
        _sync(aside)
        if final.exists():  # one that did not match its manifest, or a run begun anew
            remove(final)
        aside.rename(final)
        _sync(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot write the checkpoint {final}: {error.strerror}") from error
    return final


def _sum_of(manifest: dict[str, Any]) -> str:
    """Of its values, however they are laid out as text."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte checked.

    Raises:
        StorageError: it is not one, or does not match its manifest; the message names the file.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise StorageError(f"{folder}: checkpoint format {FORMAT} is read here, found {manifest['format']}")
        for name, expected in files.items():
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise StorageError(f"{folder / name} does not match its manifest")
        if _NAME.fullmatch(folder.name) and count_of(folder) != manifest["images_seen"]:
            raise StorageError(f"{folder / 'manifest.json'} speaks of {manifest['images_seen']} images")
        own = manifest.pop("sha256", None)  # older versions wrote none
        if own not in (None, _sum_of(manifest)):
            raise StorageError(f"{folder / 'manifest.json'} does not match its own sum")
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{folder / 'manifest.json'} is no manifest") from None
    return Checkpoint(folder, manifest)


def count_of(folder: Path) -> int:
    """Images seen, from a checkpoint folder's name."""
    return int(folder.name.removeprefix("images-"))


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; by number, since names stop sorting at 10^9 images."""
    found = (p for p in (run / "checkpoints").glob("images-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=count_of)


def set_aside_after(run: Path, images_seen: int) -> list[Path]:
    """Rename the checkpoints of more images to images-NNNNNNNNN.abandoned, and return the new names.

    A run that goes on from an earlier one would otherwise count damaged and abandoned ones among the newest.

    Raises:
        StorageError: the disk refused.
    """
    aside = []
    for folder in folders(run):
        if count_of(folder) > images_seen:
            target = folder.with_name(f"{folder.name}.abandoned")
            try:
                shutil.rmtree(target, ignore_errors=True)
                aside.append(folder.rename(target))
            except OSError as error:
                raise StorageError(f"cannot rename the checkpoint {folder}: {error.strerror}") from None
    return aside


def newest(run: Path, say: Callable[[str], None] = print, *, below: int | None = None) -> Checkpoint | None:
    """The newest checkpoint of a run that matches its manifest; what is passed over is said.

    Args:
        below: only those of fewer images.
    """
    for folder in reversed(folders(run)):
        if below is not None and count_of(folder) >= below:
            continue
        try:
            return verify(folder)
        except StorageError as error:
            say(f"passing over a checkpoint: {error}")
    return None


def load(checkpoint: Checkpoint) -> State:
    """A checkpoint's state, on the CPU; no code in it can run.

    What is read is held against the manifest once more: the manifest may come from another rank, the bytes do not.

    Raises:
        StorageError: this machine does not see the folder, or sees other bytes in it.
    """
    shared = "run.dir must be on a disk that every machine of the run sees"
    path = checkpoint.folder / "state.pt"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {checkpoint.folder}: {error.strerror}; {shared}") from None
    if hashlib.sha256(content).hexdigest() != checkpoint.manifest["files"]["state.pt"]["sha256"]:
        raise StorageError(f"{path} is not the file of the manifest that rank 0 chose; {shared}")
    try:
        state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:  # a whole file, made by someone else
        raise StorageError(f"{path} holds no state that may be read: {str(error).splitlines()[0]}") from None
    return state


def find(path: Path, say: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint that a user's path means: a checkpoint folder, or a run folder's newest good one.

    Raises:
        StorageError: there is none.
    """
    if (path / "manifest.json").exists():
        return verify(path)
    if not path.is_dir():
        raise StorageError(f"{path}: no such run or checkpoint folder{where_it_may_be(path)}")
    checkpoint = newest(path, say)
    if checkpoint is None:
        why = "" if (path / "checkpoints").is_dir() else ": it is no run's folder, or its run has saved nothing yet"
        raise StorageError(f"{path} holds no checkpoint that can be read{why}")
    return checkpoint


def best(run: Path) -> str:
    """Name of the checkpoint folder that is marked as the best; empty: none is.

    Raises:
        StorageError: the mark cannot be read, or names no checkpoint.
    """
    path = run / "checkpoints" / BEST
    try:
        name = str(json.loads(path.read_text())["checkpoint"])
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} names no checkpoint; without that file none is marked as the best") from None
    if not _NAME.fullmatch(name):
        raise StorageError(f"{path} names no checkpoint, found {name!r}; without that file none is marked as the best")
    return name


def chosen(run: Path, which: str, say: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint of a run that a command's --checkpoint means.

    Args:
        which: "best", the one that an evaluation has marked; "last", the newest good one; anything else is a path, as
            `find` takes it.

    Raises:
        StorageError: there is none, or it does not match its manifest.
    """
    if which == "last":
        return find(run, say)
    if which != "best":
        return find(Path(which), say)
    name = best(run)
    if not name:
        find(run, say)  # where there is no run at all, that is what is wrong
        raise StorageError(f"{run} has marked no checkpoint as its best (eval.every_images does); the newest is `last`")
    return verify(run / "checkpoints" / name)


def open_generator(path: Path, *, weights: Literal["ema", "live"] = "ema") -> tuple[Generator, Config, int]:
    """The generator of a run or checkpoint folder, its settings, and the images it has seen.

    Args:
        weights: G's average, or the weights as training left them; a run without an average has only these.

    Raises:
        StorageError: no good checkpoint, or a config.yaml that does not describe it.
    """
    checkpoint = find(path)
    try:
        config = from_dict(yaml.safe_load((checkpoint.folder / "config.yaml").read_text()))
    except (ConfigError, AttributeError) as error:
        raise StorageError(f"{checkpoint.folder / 'config.yaml'}: {error}") from None
    state = load(checkpoint)
    generator = Generator(config.model.nz, config.model.ngf, config.data.nc, *config.data.size)
    generator.load_state_dict(state["generator"] | (state["ema"] if weights == "ema" else {}))
    return generator, config, checkpoint.images_seen
