"""Decoded images kept: a file that the ranks of a machine map together, and that later runs map again.

The file holds the uint8 windows of all images one after another, before their random part.  Beside it lies a .json of
what it is, the CRC-32 of each of its parts, and the files that proved bad: their rows show the next good image.  It is
named by dataset, geometry and decoder, so that another of these makes another file.

Building: the first rank takes a lock, reserves the space in a partial file, every rank fills a share of it and leaves
a list of the bad files it met, the first one joins the lists, syncs and renames.  A run killed halfway leaves a partial
that the next one overwrites.  Lock, partial and lists bear the machine's name: on a shared folder two machines never
write to one file, and the last to rename leaves equal content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Parameters
from pipeline.config import DataConfig
from pipeline.decode import Decoder, Pixels, window_shape
from pipeline.decode.pillow import PillowDecoder
from pipeline.errors import StorageError
from pipeline.index import Dataset, cache_folder
from pipeline.samples import Samples, check_share
from pipeline.sources import one_line, shown

log = logging.getLogger(__name__)
T = TypeVar("T")

Kind = Literal["host", "device"]

FORMAT = 2
"""Version of the file; another number is rebuilt."""

PARTS = 256
"""The file is summed in so many parts."""

_BATCH = 128
"""Images decoded at once while building."""

_CHECKED_BYTES = 4 << 30
"""A larger file is checked by an even sample of its parts: about two seconds at every start (2.5 GB/s, 2026-11)."""

_ABANDONED_S = 86_400
"""Nobody decodes a day long: an older partial, of whatever machine, belongs to no one."""

_SPARE_DISK = 1 << 30
_SHARE_OF_MEMORY = 0.5
"""Of what is available on the host or free on the GPU, the most that images may take; the rest is for training."""


@dataclass(frozen=True)
class Cached:
    """All images of a dataset, decoded."""

    images: Pixels | Tensor
    """(len, H + m, W + m, C) uint8: a read-only memory map of the host, or a tensor on the device."""
    decoder: str
    """What decoded them."""
    path: Path
    """The file."""


def decoder_name(decoder: Decoder, device: torch.device) -> str:
    """What pixels go by: DALI on a GPU decodes with other hardware than on the CPU, to slightly other pixels."""
    return "dali-gpu" if decoder == "dali" and device.type == "cuda" else decoder


def cache_file(folder: Path, cfg: DataConfig, fingerprint: str, decoder: Decoder, device: torch.device) -> Path:
    """Where the decoded images of this dataset, geometry and decoder lie, or would."""
    shape = "x".join(map(str, window_shape(cfg)))
    return folder / f"decoded-{fingerprint[:16]}-{shape}-{decoder_name(decoder, device)}.u8"


def cache_kind(
    cfg: DataConfig, dataset: Dataset, device: torch.device, *, decoder: Decoder
) -> tuple[Literal["none", "host", "device"], str]:
    """The cache that data.cache means here, and why, as a sentence.

    It looks at what is free at this moment, so one rank must ask and tell the others.
    """
    if cfg.cache != "auto":
        return cfg.cache, f"data.cache is {cfg.cache}."
    folder = cache_folder(cfg)
    needed = len(dataset) * math.prod(window_shape(cfg))
    path = cache_file(folder, cfg, dataset.index.fingerprint, decoder, device)
    size = f"{len(dataset):,} decoded images take {_size(needed)}"
    disk, memory = _free_disk(folder), _available_memory()
    if not path.exists() and needed + _SPARE_DISK > disk:
        return "none", f"{size}; of {_size(disk)} free in {folder}, {_size(_SPARE_DISK)} shall stay so."
    if needed > memory * _SHARE_OF_MEMORY:
        return "none", f"{size}; that is more than half of the {_size(memory)} of memory that are available."
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed <= free * _SHARE_OF_MEMORY:
            return "device", f"{size}; {_size(free)} are free on the GPU."
        return "host", f"{size}; that is more than half of the {_size(free)} that are free on the GPU."
    return "host", f"{size}; {_size(disk)} are free in {folder}, {_size(memory)} of memory are available."


def machine() -> str:
    """A name that the processes of this machine share, and no other machine's, whatever their host names are."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}-{boot.read_text().strip()[:8]}" if boot.exists() else platform.node()


def folder_identity(cfg: DataConfig) -> tuple[str, int, int]:
    """What is equal for all ranks that build a cache together: the machine and the folder, under whatever path.

    torchrun's local ranks would not do: of two launchers on one machine each has a first one, and the second would wait
    for a lock that the first gives back when both are done.

    Raises:
        StorageError: the folder cannot be made.
    """
    found = cache_folder(cfg).stat()
    return machine(), found.st_dev, found.st_ino


def _alone(action: Callable[[], T]) -> T:
    return action()


def build_cache(
    cfg: DataConfig,
    dataset: Dataset,
    *,
    decoder: Decoder,
    kind: Kind,
    device: torch.device,
    threads: int,
    local_rank: int = 0,
    local_world_size: int = 1,
    together: Callable[[Callable[[], Any]], Any] = _alone,
    progress: Callable[[int, int], None] | None = None,
    samples: Samples | None = None,
) -> Cached:
    """Decode all images once, or take what an earlier run decoded.

    A kept file in which more images are replaced than the settings allow is built again: the files may be mended.

    Args:
        device: where DALI decodes, and where a `device` cache lives.
        threads: decode threads of this rank.
        together: runs an action on every rank and waits for all; a user's error of one is raised on each.  Called
            three times, whatever is found, so that it may join more ranks than this machine's.
        progress: told (images done, images in all) of this rank's share.
        samples: reads the dataset's files and lists those that proved bad: each rank's those of its own share, of a
            kept file the machine's first rank's all of them.  Between two shares one may stand in the lists of both,
            so whoever counts over the ranks counts keys.  None: nobody asks for them.

    Raises:
        DataError: more files proved bad than the settings allow.
        StorageError: the folder has too little space, or cannot be written to.
    """
    assert samples is None or samples.dataset is dataset
    samples = samples or Samples(dataset)
    shape = len(dataset), *window_shape(cfg)
    path = cache_file(cache_folder(cfg), cfg, dataset.index.fingerprint, decoder, device)
    partial = path.with_name(f"{path.name}.{machine()}.partial")
    facts: dict[str, Any] = {
        "format": FORMAT,
        "shape": list(shape),
        "fingerprint": dataset.index.fingerprint,
        "decoder": decoder_name(decoder, device),
        "jpeg_fancy_upsampling": cfg.jpeg_fancy_upsampling or decoder == "pillow",
    }
    bad_lists = [partial.with_suffix(f".{rank}.replaced") for rank in range(local_world_size)]
    allowed = cfg.bad_allowed(len(dataset))
    leads = local_rank == 0

    def prepare() -> None:
        if leads:
            stack.enter_context(_locked(partial.with_suffix(".lock")))
            for left in (partial, *bad_lists):
                left.unlink(missing_ok=True)  # of a run that was killed
            for old in path.parent.glob(f"{path.name}.*.partial"):  # before a reboot, say
                if time.time() - old.stat().st_mtime > _ABANDONED_S:
                    old.unlink(missing_ok=True)
            if _matches(path, facts) and _sums_hold(path, shape) and len(_replaced(path)) <= allowed:
                for key, reason in _replaced(path):
                    samples.note(key, reason)
                return
            for damaged in (_json_of(path), path):
                damaged.unlink(missing_ok=True)
            for ours in (partial, *bad_lists):
                stack.callback(ours.unlink, missing_ok=True)  # renamed by then, or of no use
            _reserve(partial, math.prod(shape))

    def fill() -> None:
        if partial.exists():
            out = np.memmap(partial, np.uint8, "r+", shape=shape)
            start, stop = (len(dataset) * r // local_world_size for r in (local_rank, local_rank + 1))
            _fill(out, start, stop, cfg, samples, decoder, device, threads, progress)
            out.flush()
            bad_lists[local_rank].write_text(json.dumps(samples.replaced))

    def finish() -> None:
        if leads and partial.exists():
            replaced = {key: reason for each in bad_lists for key, reason in json.loads(each.read_text())}
            check_share(cfg, list(replaced.items()), len(dataset))
            _finish(partial, path, facts | {"replaced": list(replaced.items())}, shape)

    with contextlib.ExitStack() as stack:
        for action in (prepare, fill, finish):
            together(_storage_errors(action, path))
        # As a plain array: slicing a memmap object costs Python time for each image.
        images = np.asarray(np.memmap(path, np.uint8, "r", shape=shape))
    return Cached(_to_device(images, device) if kind == "device" else images, facts["decoder"], path)


def _storage_errors(action: Callable[[], None], path: Path) -> Callable[[], None]:
    """The action, with the system's errors as a user's."""

    def run() -> None:
        try:
            action()
        except OSError as error:
            raise StorageError(f"{shown(path)}: decoded images cannot be kept ({one_line(error)})") from error

    return run


def _fill(
    out: Pixels,
    start: int,
    stop: int,
    cfg: DataConfig,
    samples: Samples,
    decoder: Decoder,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode items start..stop - 1 into their rows."""
    done = start
    items = [np.arange(i, min(i + _BATCH, stop)) for i in range(start, stop, _BATCH)]
    for windows in decoded_windows(items, cfg, samples, decoder, device, threads):
        check_share(cfg, samples.replaced, len(samples.dataset))  # where the disk is gone, not only at the end
        out[done : done + len(windows)] = windows
        done += len(windows)
        if progress:
            progress(done - start, stop - start)


def decoded_windows(
    items: Sequence[np.ndarray],
    cfg: DataConfig,
    samples: Samples,
    decoder: Decoder,
    device: torch.device,
    threads: int,
) -> Iterator[Pixels]:
    """The windows of each batch of items, (N, H + m, W + m, C) uint8 on the CPU, before their random part.

    Raises:
        DataError: no file of the dataset is good any more.
    """
    if decoder == "dali":
        from pipeline.decode.dali import DaliDecoder

        nothing = Parameters(None, None, None, None)
        dali = DaliDecoder(
            cfg, samples, device=device, threads=threads, max_batch=max(map(len, items), default=1), augmented=False
        )
        with contextlib.closing(dali):
            for output in dali.images((batch, nothing) for batch in items):
                yield torch.from_dlpack(output).cpu().numpy()
    else:
        height, width, channels = window_shape(cfg)
        with contextlib.closing(PillowDecoder(samples, (height, width), channels, threads)) as pillow:
            yield from pillow.windows(items)


def _json_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _matches(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the file is complete and what facts say; its content is not read."""
    try:
        found = json.loads(_json_of(path).read_text())
        if {key: found.get(key) for key in facts} != facts or path.stat().st_size != math.prod(facts["shape"]):
            return False
        return all(isinstance(text, str) for key, reason in found["replaced"] for text in (key, reason))
    # Absent, not JSON, JSON but no object, no list of pairs in it.
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _replaced(path: Path) -> list[tuple[str, str]]:
    """Key and reason of each file whose row in this one shows another's image."""
    return [(key, reason) for key, reason in json.loads(_json_of(path).read_text())["replaced"]]


def _parts(images: Pixels) -> list[Pixels]:
    return [part for part in np.array_split(images, PARTS) if len(part)]


def _sums_hold(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the parts have the CRCs of the .json: a disk that lost a page is noticed here, not in the pictures."""
    sums = json.loads(_json_of(path).read_text()).get("crc32")
    parts = _parts(np.memmap(path, np.uint8, "r", shape=shape))
    step = -(-math.prod(shape) // _CHECKED_BYTES)
    if not isinstance(sums, list) or len(sums) != len(parts):
        return False
    return all(zlib.crc32(part.data) == expected for part, expected in zip(parts[::step], sums[::step], strict=True))


def _reserve(partial: Path, num_bytes: int) -> None:
    """Take the space now: on a full disk, writing through a map would be a SIGBUS instead of an error."""
    with partial.open("wb") as file:  # an older partial gives its space back here
        free = _free_disk(partial.parent)
        try:
            if not hasattr(os, "posix_fallocate"):  # macOS
                file.truncate(num_bytes)
            elif num_bytes > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            else:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            found = f"decoded images take {_size(num_bytes)}, {_size(free)} are free ({error.strerror})"
            remedy = "make room, set data.cache_dir to another folder, or set data.cache to none"
            raise StorageError(f"{shown(partial.parent)}: {found}; {remedy}") from error


def _finish(partial: Path, path: Path, facts: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Sum, sync and rename; the .json comes last, because it is what makes the file count."""
    images = np.memmap(partial, np.uint8, "r", shape=shape)
    text = json.dumps(facts | {"crc32": [zlib.crc32(part.data) for part in _parts(images)]}) + "\n"
    aside = partial.with_suffix(".json")
    aside.write_text(text)
    for written in (partial, aside):
        with written.open("rb+") as file:
            os.fsync(file.fileno())
    partial.replace(path)
    aside.replace(_json_of(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine; the system drops it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another run decodes the same images; waiting for it", shown(path.parent))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _to_device(images: Pixels, device: torch.device) -> Tensor:
    """A copy on the device, part by part, so that the host never holds a second one."""
    out = torch.empty(images.shape, dtype=torch.uint8, device=device)
    done = 0
    for part in _parts(images):
        out[done : done + len(part)] = torch.from_numpy(part.copy())
        done += len(part)
    return out


def _available_memory() -> int:
    """Bytes that programs may still take, the system's file cache included."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_disk(folder: Path) -> int:
    """Bytes free where the folder is, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
