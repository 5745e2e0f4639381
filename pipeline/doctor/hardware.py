"""The machine: GPUs, processor, memory, and what limits this process to a part of them."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.doctor import ROOT, TROUBLE, Check, failed, first_line, look, ok, several, size, warning

LEAST_GPU_MEMORY = 2 << 30
LIBRARIES = 1 << 30
"""Of memory that a rank takes for Python, torch and DALI besides what training itself needs."""
SHM_GOOD, SHM_LEAST = 512 << 20, 64 << 20
"""Bytes free in /dev/shm; NCCL puts its buffers between the GPUs of a machine there, some ten MiB for each pair."""
FILES_GOOD, FILES_LEAST = 1024, 256
"""Open files: a source maps up to 256 shards, and libraries, data files and sockets come on top."""
CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""A limit from here on is none."""


def checks(local_ranks: int) -> list[Check]:
    """
    Args:
        local_ranks: how many ranks share this machine.
    """
    found = look("gpus", gpus, local_ranks)
    found += look("cpu", cpu)
    found += look("cores", lambda: cores(local_ranks, limits()))
    found += look("load", load)
    found += look("threads", threads)
    found += look("numa", numa)
    found += look("memory", lambda: memory(local_ranks, limits()))
    found += look("/dev/shm", shared_memory)
    found += look("open files", open_files)
    return found + look("clock", clock)


@dataclass(frozen=True)
class Limits:
    """What the cgroups of this process grant it; None: no limit."""

    cpus: float | None = None
    """Cores' worth of time."""
    memory: int | None = None
    """Bytes that may still be taken."""


# GPUs


def gpus(local_ranks: int = 1, devices: Path = Path("/dev")) -> list[Check]:
    """One check for the driver, one for each GPU."""
    import torch

    there = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        if not there:
            return [ok("gpus", "none; training runs on the CPU")]
        if hidden is not None and hidden.strip() in ("", "-1"):
            return [ok("gpus", f"{len(there)} hidden by CUDA_VISIBLE_DEVICES={hidden!r}; training runs on the CPU")]
        found = f"{len(there)} here, but torch cannot use them, and would train on the CPU: {_why_no_cuda()}"
        kind = "an older torch" if torch.version.cuda else "torch built for CUDA"
        return [failed("gpus", found, f"install {kind} or a newer driver; CUDA_VISIBLE_DEVICES='' trains on the CPU")]
    count = torch.cuda.device_count()
    found = f"{several(count, 'GPU')}, driver {_driver()}"
    if local_ranks > count:
        return [failed("gpus", f"{found}, and {local_ranks} ranks here", f"--nproc_per_node must be at most {count}")]
    return [ok("gpus", found), *(check for i in range(count) for check in look(f"gpu {i}", _gpu, i))]


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except TROUBLE as error:
        return first_line(error)
    return "it gives no reason"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", path.read_text()) if path.exists() else None
    return version[0] if version else "of an unknown version"


def _gpu(index: int) -> list[Check]:
    """Its memory, and whether this torch has code for it: told by computing something."""
    import torch

    name = f"gpu {index}"
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    found = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {size(free)} of {size(total)} free"
    try:
        images = torch.ones(2, 3, 8, 8, device=torch.device("cuda", index))
        right = bool(torch.nn.functional.conv2d(images, images).mean() == 192.0)
    except RuntimeError as error:
        return [failed(name, f"{found}; does not compute: {first_line(error)}", "install torch for this GPU")]
    if not right:
        return [failed(name, f"{found}; computes a convolution wrongly", "leave it out by CUDA_VISIBLE_DEVICES")]
    if free < LEAST_GPU_MEMORY:
        advice = "nvidia-smi tells who holds it; CUDA_VISIBLE_DEVICES chooses another GPU"
        return [warning(name, f"{found}: little", advice)]
    return [ok(name, found)]


# Processor


def cpu() -> list[Check]:
    import torch

    from pipeline.environment import cpu_name
    from pipeline.precision import bf16_instructions, cpu_has_fast_bf16

    vectors = torch.backends.cpu.get_cpu_capability()
    fast, instructions = cpu_has_fast_bf16(), bf16_instructions()
    if instructions and not fast:
        found = f"{cpu_name()}, {vectors}; ONEDNN_MAX_CPU_ISA forbids its {instructions}"
        return [warning("cpu", found, "unset ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA")]
    arithmetic = f"bf16, by {instructions}" if fast else "fp32, for it has neither AMX nor AVX512_BF16"
    return [ok("cpu", f"{cpu_name()}, {vectors}; precision auto on it: {arithmetic}")]


def cores(local_ranks: int = 1, granted: Limits | None = None) -> list[Check]:
    """Cores that this process may use, and the time on them that its cgroup grants."""
    allowed, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = granted.cpus if granted else None
    found = f"{allowed} of {present} allowed, {several(local_ranks, 'rank')} here"
    if quota is not None and quota < allowed:
        each = max(1, math.floor(quota / local_ranks))
        advice = f"--distributed.threads {each} --data.workers {each}, or a container with more CPU"
        return [warning("cores", f"{found}; the cgroup grants the time of {quota:g}: threads would stall", advice)]
    if local_ranks > allowed:
        return [warning("cores", f"{found}: they take turns", f"--nproc_per_node={allowed}, or more cores")]
    return [ok("cores", found)]


def load(programs: float | None = None) -> list[Check]:
    """What else runs here: the figures of this program, and a training, are as slow as that makes them."""
    wanted, present = os.getloadavg()[0] if programs is None else programs, os.cpu_count() or 1
    found = f"{wanted:.1f} programs wanted a core during the last minute, {present} are there"
    if wanted > 1.5 * present:
        return [warning("load", f"{found}: training shares them", "end other programs (top names them), or wait")]
    return [ok("load", found)]


def threads() -> list[Check]:
    """The trainer sets its own number of threads; what can harm is pinning them."""
    omp = os.environ.get("OMP_NUM_THREADS")
    found = f"OMP_NUM_THREADS is {omp or 'not set'}; training takes cores / ranks, or distributed.threads"
    pins = [key for key in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY") if os.environ.get(key)]
    pins = [key for key in pins if os.environ[key].lower() not in ("false", "none", "disabled")]
    if pins:
        shown = ", ".join(f"{key}={os.environ[key]}" for key in pins)
        return [warning("threads", f"{found}; {shown} may put all ranks on the same cores", f"unset {' '.join(pins)}")]
    return [ok("threads", found)]


def numbers_of(cpu_list: str) -> set[int]:
    """0-2,8 as {0, 1, 2, 8}."""
    found: set[int] = set()
    for part in cpu_list.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def numa(folder: Path = Path("/sys/devices/system/node"), allowed: set[int] | None = None) -> list[Check]:
    """On how many memory nodes this process may run."""
    import torch

    mine = os.sched_getaffinity(0) if allowed is None else allowed
    nodes = {path.name: numbers_of((path / "cpulist").read_text()) for path in folder.glob("node[0-9]*")}
    with_cpus = {name: cpus for name, cpus in nodes.items() if cpus}
    if len(with_cpus) < 2:
        return [ok("numa", "one node")]
    on = sorted(name for name, cpus in with_cpus.items() if cpus & mine)
    found = f"{len(with_cpus)} nodes, this process on {', '.join(on)}"
    if len(on) == 1 or torch.cuda.is_available():
        return [ok("numa", found)]
    how = "numactl --cpunodebind=0 --membind=0 before the command, for one rank on each node; or a GPU"
    return [warning("numa", f"{found}: on a CPU its threads wait for the other node's memory", how)]


# Memory and limits


def limits(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """The narrowest of this process's cgroups and of those around them, version 1 or 2."""
    cpus: list[float] = []
    memory: list[int] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")  # none in version 2, whose mount is the root
        mount = next(path for path in (root / controllers, *(root / name for name in names), root) if path.is_dir())
        # In a container the path may be the host's: the part of it that is seen here counts.
        folders = [mount / Path(path.lstrip("/")), *(mount / Path(path.lstrip("/"))).parents]
        for folder in folders[: folders.index(mount) + 1]:
            cpus += [q for q in (_cpus_of(folder),) if q is not None]
            memory += [m for m in (_memory_of(folder),) if m is not None]
    return Limits(min(cpus, default=None), min(memory, default=None))


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def _cpus_of(folder: Path) -> float | None:
    words = _words(folder / "cpu.max") or [
        *_words(folder / "cpu.cfs_quota_us"),
        *_words(folder / "cpu.cfs_period_us"),
    ]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _memory_of(folder: Path) -> int | None:
    limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
    if not limit or not used or limit[0] == "max" or int(limit[0]) >= _NO_LIMIT:
        return None
    stat = _words(folder / "memory.stat")
    facts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
    # The file cache gives way when it has to.
    cache = facts.get("total_inactive_file", facts.get("inactive_file", 0))
    return max(0, int(limit[0]) - int(used[0]) + cache)


def memory(local_ranks: int = 1, granted: Limits | None = None) -> list[Check]:
    """What programs may still take, held against what the default settings need."""
    import torch

    from pipeline.config import Config
    from pipeline.sizes import memory_of, networks_of

    text = Path("/proc/meminfo").read_text()
    facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()}
    limit = granted.memory if granted else None
    available = facts["MemAvailable"] if limit is None else min(limit, facts["MemAvailable"])
    by_whom = "" if available == facts["MemAvailable"] else " by the cgroup's limit"
    cfg, need = Config(), LIBRARIES * local_ranks
    if not torch.cuda.is_available():
        share = -(-cfg.train.batch_size // local_ranks)
        need += local_ranks * memory_of(cfg, networks_of(cfg), "fp32", share).total
    found = f"{size(available)} of {size(facts['MemTotal'])} available{by_whom}"
    wanted = f"the default settings take about {size(need)} on {several(local_ranks, 'rank')}"
    if available < need:
        advice = "end other programs, raise the container's limit, or take a smaller --train.batch_size"
        return [(failed if available < need / 2 else warning)("memory", f"{found}; {wanted}", advice)]
    return [ok("memory", f"{found}; {wanted}")]


def shared_memory(path: Path = Path("/dev/shm"), gpus_here: int | None = None) -> list[Check]:
    """Where the processes of a machine meet: needed by NCCL between several GPUs, by nothing else here."""
    if gpus_here is None:
        import torch

        gpus_here = torch.cuda.device_count()
    advice = "docker run --shm-size=1g; as root: mount -o remount,size=1g /dev/shm"
    try:
        usage = shutil.disk_usage(path)
        probe = path / f".dcgan-doctor-{os.getpid()}"
        probe.write_bytes(b"x" * min(1 << 20, usage.free // 2))
        probe.unlink()
    except OSError as error:
        state = failed if gpus_here > 1 else warning
        return [state("/dev/shm", f"{path} cannot be written ({error.strerror})", advice)]
    found = f"{size(usage.free)} of {size(usage.total)} free"
    if usage.free < SHM_LEAST and gpus_here > 1:
        return [failed("/dev/shm", f"{found}: too little for NCCL between {gpus_here} GPUs", advice)]
    if usage.free < SHM_GOOD:
        return [warning("/dev/shm", f"{found}: little for NCCL between several GPUs", advice)]
    return [ok("/dev/shm", found)]


def open_files() -> list[Check]:
    """ulimit -n, which holds for this process and what it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if soft == resource.RLIM_INFINITY or soft >= FILES_GOOD:
        return [ok("open files", f"up to {'any number' if soft == resource.RLIM_INFINITY else soft}")]
    raised = "ulimit -n 4096" if hard == resource.RLIM_INFINITY or hard >= 4096 else f"ulimit -n {hard}"
    if hard != resource.RLIM_INFINITY and hard < FILES_GOOD:
        raised = (
            "as root: nofile in /etc/security/limits.conf, docker run --ulimit nofile=4096, LimitNOFILE= of systemd"
        )
    state = failed if soft < FILES_LEAST else warning
    found = f"up to {soft} (ulimit -n; it may be raised to {most}); sources map up to 256 shards"
    return [state("open files", found, raised)]


def clock(now: float | None = None) -> list[Check]:
    """A clock before the newest file of the project is wrong: names of logs and time limits go by it."""
    now = time.time() if now is None else now
    newest = max(path.stat().st_mtime for path in (ROOT / "pipeline").glob("*.py"))
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < newest - 3600:
        late = time.strftime("%Y-%m-%d", time.gmtime(newest))
        return [
            warning("clock", f"{found}, before the project's files of {late}", "set the clock: timedatectl, chrony")
        ]
    return [ok("clock", found)]
