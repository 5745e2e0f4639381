"""Folders: can they be made and written, how fast, how much fits, and on what disk they are."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, DataConfig
from pipeline.doctor import Check, failed, first_line, look, ok, several, size, warning
from pipeline.errors import UserError

PROBE_BYTES = 16 << 20
SLOW = 10e6
"""Bytes a second of writing below which a checkpoint takes noticeably long."""
SPARE = 1 << 30
"""Free bytes in the cache folder that the trainer leaves alone."""
_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "9p",
    "glusterfs",
    "pvfs2",
}
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuseblk"}
_MEMORY = {"tmpfs", "ramfs"}
CELEBA = 202_599
"""Images of the set that the default settings are for."""


def checks(run_dir: str, dataroot: str, cache_dir: str, world_size: int) -> list[Check]:
    """
    Args:
        run_dir, dataroot, cache_dir: as the trainer's options; empty: its default, for dataroot nothing.
    """
    counted: list[int] = []
    found = look("photographs", photographs, dataroot, counted) if dataroot else []
    run = look("run folder", run_folder, Path(run_dir or "runs"), world_size)
    return run + look("cache folder", cache_folder, cache_dir, sum(counted)) + found


@dataclass(frozen=True)
class Disk:
    """What lies under a path."""

    mounted_at: str
    kind: str
    """Of file system, as in /proc/mounts."""

    @property
    def on_network(self) -> bool:
        return self.kind in _NETWORK or (self.kind.startswith("fuse") and self.kind not in _LOCAL_FUSE)

    @property
    def in_memory(self) -> bool:
        return self.kind in _MEMORY


def disk_under(path: Path, mounts: Path = Path("/proc/mounts")) -> Disk:
    """The mount with the longest path above this one; of several at one place the last, which covers the others."""
    real = path.resolve()
    found = Disk("/", "unknown")
    for line in mounts.read_text(errors="replace").splitlines():
        _, where, kind, *_ = line.split()
        where = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), where)  # blanks stand as \040
        if real.is_relative_to(where) and len(where) >= len(found.mounted_at):
            found = Disk(where, kind)
    return found


def nearest(path: Path) -> Path:
    """The path itself where it is there, else the folder in which it would be made."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def written(folder: Path) -> float:
    """Seconds to write some MiB into a folder and to have them on the disk; less where little is free.

    Raises:
        OSError: it refuses.
    """
    content = secrets.token_bytes(min(PROBE_BYTES, max(4096, shutil.disk_usage(folder).free // 4)))
    probe = folder / f".dcgan-doctor-{secrets.token_hex(6)}"
    begun = time.perf_counter()
    try:
        with probe.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - begun) * PROBE_BYTES / len(content)
    finally:
        probe.unlink(missing_ok=True)


def run_folder(path: Path, world_size: int = 1, mounts: Path = Path("/proc/mounts")) -> list[Check]:
    """Whether checkpoints find room and a disk that keeps them."""
    from pipeline.sizes import disk_of, networks_of

    name, advice = "run folder", "--run.dir with a folder that can be written"
    looked = _look_into(name, path, advice)
    if isinstance(looked, Check):
        return [looked]
    cfg = Config()
    needs = disk_of(cfg, networks_of(cfg), cfg.train.num_steps(CELEBA), world_size)
    folder, seconds = looked
    free, disk = shutil.disk_usage(folder).free, disk_under(folder, mounts)
    speed = PROBE_BYTES / seconds
    state = "" if path.exists() else "can be made, "
    found = f"{path}: {state}{disk.kind}{' over the network' * disk.on_network}, {size(free)} free, "
    found += f"writes {speed / 1e6:,.0f} MB/s"
    wanted = f"the default settings need {size(needs.total)}, {size(needs.checkpoint)} for each of "
    wanted += several(needs.num_checkpoints, "checkpoint")
    if free < 2 * needs.checkpoint:
        return [failed(name, f"{found}; {wanted}", "make room, or --run.dir on another disk")]
    if free < needs.total:
        return [warning(name, f"{found}; {wanted}", "make room, a smaller --checkpoint.keep, or another --run.dir")]
    if disk.in_memory:
        return [warning(name, f"{found}: gone when the machine restarts", "--run.dir on a disk")]
    if speed < SLOW:
        found = f"{found}: a checkpoint takes {needs.checkpoint / speed:.0f} s"
        return [warning(name, found, "a larger --checkpoint.every_images, or --run.dir on a faster disk")]
    return [ok(name, f"{found}; {wanted}")]


def cache_folder(cache_dir: str, num_images: int = 0, mounts: Path = Path("/proc/mounts")) -> list[Check]:
    """Whether indexes and decoded images find room, near.

    Args:
        num_images: of the photographs; 0: not known.
    """
    from pipeline.index import cache_path

    name, advice = "cache folder", "--data.cache_dir with a folder that can be written"
    path = cache_path(cache_dir)
    looked = _look_into(name, path, advice)
    if isinstance(looked, Check):
        return [looked]
    folder, seconds = looked
    free, disk = shutil.disk_usage(folder).free, disk_under(folder, mounts)
    height, width = Config().data.size
    needed = (num_images or CELEBA) * height * width * 3
    of = f"{several(num_images, 'decoded image')} of 64 x 64" if num_images else "CelebA's decoded images of 64 x 64"
    state = "" if path.exists() else "can be made, "
    found = f"{path}: {state}{disk.kind}{' over the network' * disk.on_network}, {size(free)} free, "
    found += f"writes {PROBE_BYTES / seconds / 1e6:,.0f} MB/s; {of} take {size(needed)}"
    if free < (needed if num_images else 0) + SPARE:
        found = f"{found} and {size(SPARE)} shall stay free: every epoch would decode anew"
        return [warning(name, found, "make room, or --data.cache_dir on another disk")]
    if disk.in_memory:
        found = f"{found}, of this machine's memory, and are gone when it restarts"
        return [warning(name, found, "--data.cache_dir on a disk of this machine")]
    if disk.on_network:
        found = f"{found}, and training reads them in no order"
        return [warning(name, found, "--data.cache_dir on a disk of this machine")]
    return [ok(name, found)]


def _look_into(name: str, path: Path, advice: str) -> tuple[Path, float] | Check:
    """The folder that is there, this one or one above it, and the seconds of `written` in it; or what refuses."""
    folder = nearest(path)
    if not folder.is_dir():  # where the folder should be, or on the way to it
        return failed(name, f"{path}: {folder} is a file", advice)
    try:
        return folder, written(folder)
    except OSError as error:
        return failed(name, f"{path}: cannot be written in {folder} ({error.strerror})", advice)


def photographs(dataroot: str, counted: list[int]) -> list[Check]:
    """Whether the source opens and names images; how many goes into `counted`.  Their headers are not read."""
    from pipeline.sources import open_source

    name = "photographs"
    try:
        source = open_source(DataConfig(dataroot=dataroot).dataroot)
        files = len(source)
    except UserError as error:
        return [failed(name, " ".join(str(error).split()), "--data.dataroot with a folder, .zip or .tar of images")]
    except OSError as error:
        return [failed(name, f"{dataroot}: {first_line(error)}", "--data.dataroot with files that can be read")]
    if not files:
        return [failed(name, f"{dataroot}: no images", "--data.dataroot with a folder, .zip or .tar of images")]
    counted.append(files)
    disk = disk_under(nearest(Path(dataroot)))
    found = f"{dataroot}: {several(files, 'image')} by their names, {disk.kind}{' over the network' * disk.on_network}"
    return [ok(name, found)]
