"""Checkpoints that prove themselves: a folder written aside, synced, given a manifest of SHA-256 sums, then renamed.

What does not match its manifest does not exist: the loader walks back to the newest folder that does.  Files hold
tensors and plain values only and are read with weights_only=True.

    RUN/checkpoints/images-000025600/
        state.pt        both networks, both optimisers, both scalers, G's average, every rank's BatchNorm statistics
        config.yaml     the resolved settings
        manifest.json   sums and sizes of the files, images seen, what a resumed run must share, the layout
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from pipeline.config import Config, ConfigError, from_dict
from pipeline.errors import StorageError
from pipeline.models import Generator
from pipeline.step import Players

FORMAT = 1
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


def _on_cpu(value: Any) -> Any:
    """A copy that training cannot change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(v) for v in value]
    return value


def snapshot(players: Players, rank_buffers: list[Tensor]) -> State:
    """Everything that changes during training, copied to the CPU.

    Args:
        rank_buffers: `buffers_of` of every rank, in rank order.
    """
    parts = {
        "generator": players.generator.state_dict(),
        "discriminator": players.discriminator.state_dict(),
        "ema": players.ema,
        "optimizer_g": players.optimizer_g.state_dict(),
        "optimizer_d": players.optimizer_d.state_dict(),
        "scaler_g": players.scaler_g.state_dict(),
        "scaler_d": players.scaler_d.state_dict(),
    }
    state: State = _on_cpu(parts)
    state["rank_buffers"] = rank_buffers
    return state


def restore(players: Players, state: State, rank: int, world_size: int) -> None:
    """Put a snapshot back.  At another world size every rank gets the mean of the statistics.

    The learning rate stays the one the optimisers were built with: it may change on resume, and so may the memory
    format.  Adam's moments then take that of their parameter, since its fused kernel walks both as flat memory.
    """
    restore_weights(players, state)
    for optimizer, name in ((players.optimizer_g, "optimizer_g"), (players.optimizer_d, "optimizer_d")):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state[name])
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(run: Path, state: State, config_yaml: str, manifest: dict[str, Any]) -> Path:
    """Write one checkpoint and return its folder.

    Raises:
        StorageError: the disk is full or cannot be written; nothing of the attempt stays.
    """
    final = folder_of(run, manifest["images_seen"])
    aside = final.with_name(f".{final.name}.partial")
    buffer = io.BytesIO()
    torch.save(state, buffer)  # into memory first: on a full disk torch.save raises an obscure RuntimeError
    files: dict[str, bytes | memoryview] = {"state.pt": buffer.getbuffer(), "config.yaml": config_yaml.encode()}
    sums = {k: {"sha256": hashlib.sha256(v).hexdigest(), "bytes": memoryview(v).nbytes} for k, v in files.items()}
    text = json.dumps({"format": FORMAT, **manifest, "files": sums}, indent=1)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, data in {**files, "manifest.json": text.encode()}.items():
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(aside)
        if final.exists():  # one that did not match its manifest, or a run begun anew
            shutil.rmtree(final)
        aside.rename(final)
        _sync(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot write the checkpoint {final}: {error.strerror}") from error
    return final


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
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{folder / 'manifest.json'} is no manifest") from None
    return Checkpoint(folder, manifest)


def count_of(folder: Path) -> int:
    """Images seen, from a checkpoint folder's name."""
    return int(folder.name.removeprefix("images-"))


def _folders(run: Path) -> list[Path]:
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
    for folder in _folders(run):
        if count_of(folder) > images_seen:
            target = folder.with_name(f"{folder.name}.abandoned")
            try:
                shutil.rmtree(target, ignore_errors=True)
                aside.append(folder.rename(target))
            except OSError as error:
                raise StorageError(f"cannot rename the checkpoint {folder}: {error.strerror}") from None
    return aside


def newest(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint of a run that matches its manifest; what is passed over is said."""
    for folder in reversed(_folders(run)):
        try:
            return verify(folder)
        except StorageError as error:
            say(f"passing over a checkpoint: {error}")
    return None


def load(checkpoint: Checkpoint) -> State:
    """A checkpoint's state, on the CPU; no code in it can run.

    Raises:
        StorageError: this machine does not see the folder.
    """
    try:
        state: State = torch.load(checkpoint.folder / "state.pt", map_location="cpu", weights_only=True)
    except OSError as error:
        reason = f"{error.strerror}; run.dir must be on a disk that every machine of the run sees"
        raise StorageError(f"cannot read the checkpoint {checkpoint.folder}: {reason}") from None
    return state


def find(path: Path, say: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint that a user's path means: a checkpoint folder, or a run folder's newest good one.

    Raises:
        StorageError: there is none.
    """
    if (path / "manifest.json").exists():
        return verify(path)
    if not path.is_dir():
        raise StorageError(f"{path}: no such run or checkpoint folder")
    checkpoint = newest(path, say)
    if checkpoint is None:
        raise StorageError(f"{path} holds no checkpoint that can be read")
    return checkpoint


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


class Writer:
    """Writes checkpoints off the training thread, one at a time, and removes the old ones."""

    def __init__(self, run: Path, keep: int, milestone_images: list[int]) -> None:
        self.run, self.keep, self.milestone_images = run, keep, sorted(milestone_images)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self.last: Path | None = None

    def save(self, state: State, config_yaml: str, manifest: dict[str, Any]) -> None:
        """Begin writing; waits for the write before it.

        Raises:
            StorageError: the write before this one failed.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, state, config_yaml, manifest)

    def _write(self, state: State, config_yaml: str, manifest: dict[str, Any]) -> Path:
        folder = write(self.run, state, config_yaml, manifest)
        self.last = folder
        self._prune()
        return folder

    def _prune(self) -> None:
        """Remove all but the newest `keep` and, of each milestone, the first checkpoint that reached it."""
        folders = _folders(self.run)
        counts = [count_of(p) for p in folders]
        stays = set(counts[-self.keep :])
        for milestone in self.milestone_images:
            stays |= set([c for c in counts if c >= milestone][:1])
        for folder, count in zip(folders, counts, strict=True):
            if count not in stays:
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    raise StorageError(f"cannot remove the old checkpoint {folder}: {error.strerror}") from None

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            StorageError: the write failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the write in flight and end the thread."""
        self._pool.shutdown(wait=True)
