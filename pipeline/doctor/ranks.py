"""The ranks of a torchrun: do all come, do they run the same, do their clocks agree, does what they add up arrive.

They talk through torchrun's store first, so that rank 0 can name who is missing and which step failed for whom, and
only then through the process group that training uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.doctor import ROOT, TROUBLE, Check, failed, first_line, ok, size, warning
from pipeline.doctor.folders import nearest

SKEW_S = 1.0
"""Clocks further apart than this make logs of several machines hard to read."""
MESSAGES = ((1 << 10, 50), (32 << 10, 50), (1 << 20, 20), (16 << 20, 5))
"""Bytes of an all-reduce, and how often it is timed."""
PINGS = 3
_LONG = timedelta(minutes=20)
"""What others wait for rank 0, who knows more; torchrun ends them if it dies."""
_INTERFACES = "open the ports between the machines, or name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Place:
    """Where this process stands, as torchrun says; without torchrun the only rank there is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> Place:
        """
        Raises:
            ConfigError: a variable is no number.
        """
        values = {key: os.environ.get(key, default) for key, default in _VARIABLES.items()}
        for key, value in values.items():
            if not value.isdigit():
                raise ConfigError(f"the environment variable {key} must be a whole number, got {value!r}")
        return Place(*map(int, values.values()))

    @property
    def node(self) -> int:
        """The first rank of this machine."""
        return self.rank - self.local_rank

    @property
    def leads_node(self) -> bool:
        """Looks at the machine for all of its ranks."""
        return self.local_rank == 0


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Meeting:
    """What ranks tell each other through a store: values that JSON can hold.

    Args:
        store: torchrun's, with a prefix of its own.
        wait_s: how long rank 0 waits for the others.
    """

    def __init__(self, store: Any, place: Place, wait_s: float) -> None:
        self.store, self.place, self.wait_s = store, place, wait_s
        self.present = list(range(place.world_size))
        """Rank 0: those that are listened to."""

    def tell(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.place.rank}", json.dumps(value))

    def hear(self, what: str, longer_s: float = 0.0) -> dict[int, Any]:
        """Rank 0: what each rank told; those that have not within wait_s, and what is given on top, are left out."""
        deadline = time.monotonic() + self.wait_s + longer_s
        found = {}
        for rank in self.present:
            key = f"{what}/{rank}"
            try:
                self.store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except RuntimeError:  # torch's DistStoreError: not yet
                continue
            found[rank] = json.loads(self.store.get(key))
        return found

    def decide(self, what: str, value: Any = None) -> Any:
        """Rank 0's value, on every rank."""
        if self.place.rank == 0:
            self.store.set(f"decided/{what}", json.dumps(value))
            return value
        self.store.wait([f"decided/{what}"], _LONG)
        return json.loads(self.store.get(f"decided/{what}"))

    def part(self, sound: bool) -> bool:
        """Rank 0's verdict, on every rank: torchrun on one machine waits minutes for another's that ended otherwise."""
        verdict = bool(self.decide("verdict", sound))
        self.tell("parts", True)
        if self.place.rank == 0:
            self.hear("parts")  # the store may be this process's
        return verdict


def join(place: Place, wait_s: float) -> Meeting:
    """Come to torchrun's store.

    Raises:
        RuntimeError, ValueError: it is not there, or the environment does not say where it is.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=wait_s)))
    store.set_timeout(_LONG)
    return Meeting(dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), place, wait_s)


def not_joined(place: Place, error: BaseException) -> Check:
    where = f"{os.environ.get('MASTER_ADDR', 'an unnamed host')}:{os.environ.get('MASTER_PORT', '29500')}"
    found = f"rank {place.rank} on {socket.gethostname()} does not reach {where}: {first_line(error)}"
    return failed("rendezvous", found, f"check --rdzv_endpoint or --master_addr; {_INTERFACES}")


@dataclass
class Findings:
    """Of rank 0 for all; other ranks find nothing."""

    checks: list[Check] = field(default_factory=list)
    others: dict[str, list[Check]] = field(default_factory=dict)
    """Machine, for people: what its first rank found there.  Rank 0's own is not among them."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """Each rank with host, device and process id."""
    all_reduce: list[dict[str, float]] = field(default_factory=list)
    """Of each size in bytes: milliseconds and GiB a second."""
    unusable: list[int] = field(default_factory=list)
    """Ranks whose packages are not fit for training; on rank 0."""
    well: bool = False
    """Whether the ranks can go on together, the same on each."""


def examine(meeting: Meeting, local: list[Check], run_dir: str, *, usable: bool = True) -> Findings:
    """All looks that take several ranks; every rank calls it.

    Args:
        local: what the first rank of a machine found on it.
        usable: whether the packages there are.
    """
    place = meeting.place
    meeting.tell("here", _introduction(place, local) | {"usable": usable})
    findings = Findings()
    if place.rank == 0:
        _gathered(findings, meeting)
    if not meeting.decide("all here", not any(c.state == "failed" for c in findings.checks)):
        return findings
    findings.checks += _clocks(meeting)
    findings.checks += _one_folder(meeting, run_dir)
    mine = _measured(meeting)
    meeting.tell("all-reduce", mine)
    if place.rank == 0:
        _judged(findings, meeting.hear("all-reduce", meeting.wait_s), meeting)
    findings.well = meeting.decide("well", not findings.unusable and all(c.state != "failed" for c in findings.checks))
    return findings


def _introduction(place: Place, local: list[Check]) -> dict[str, Any]:
    from pipeline import distributed, environment

    said: dict[str, Any] = {"host": socket.gethostname(), "node": place.node, "pid": os.getpid(), "problem": ""}
    said["checks"] = [asdict(check) for check in local]
    try:
        device = distributed.from_environment().device
        said["device"] = str(device)
        if device.type == "cuda":
            import torch

            said["device"] += f" {torch.cuda.get_device_name(device)}"
        said["versions"] = environment.versions() | {"this project": project()}
    except TROUBLE as error:
        said["problem"] = first_line(error)
    return said


def project(root: Path = ROOT) -> str:
    """A short sum over the project's code: equal where the same is run, whatever git says."""
    digest = hashlib.sha256()
    for folder in ("kernels", "launch", "pipeline"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _gathered(findings: Findings, meeting: Meeting) -> None:
    """Who is here, on which machine, with what."""
    place = meeting.place
    here = meeting.hear("here")
    meeting.present = list(here)
    missing = [rank for rank in range(place.world_size) if rank not in here]
    findings.unusable = [rank for rank, said in here.items() if not said["usable"]]
    if missing:
        found = f"{_names(missing)} of {place.world_size} not here after {meeting.wait_s:g} s"
        advice = "look at their output; a slow disk may need --wait-s 300"
        findings.checks.append(failed("rendezvous", found, advice))
    else:
        findings.checks.append(ok("rendezvous", f"all {place.world_size} ranks are here"))
    for rank, said in here.items():
        if said["problem"]:
            advice = "mend what it names on that machine"
            findings.checks.append(failed("rendezvous", f"rank {rank} on {said['host']}: {said['problem']}", advice))
    findings.table = [
        {"rank": rank, **{k: said.get(k) for k in ("host", "device", "pid")}} for rank, said in here.items()
    ]
    for node in sorted({said["node"] for said in here.values()}):
        ranks = [rank for rank, said in here.items() if said["node"] == node]
        label = f"{here[ranks[0]]['host']} ({_names(ranks)})"
        devices = sorted({here[rank].get("device", "unknown") for rank in ranks})
        findings.checks.append(ok("machine", f"{label}: {', '.join(devices)}"))
        if node != place.node and node in here:
            findings.others[label] = [Check(**values) for values in here[node]["checks"]]
    findings.checks.append(same_versions({rank: said.get("versions", {}) for rank, said in here.items()}))


def same_versions(told: dict[int, dict[str, str]]) -> Check:
    """Whether all ranks run the same: another torch adds up otherwise, other code waits for what never comes."""
    differing = []
    for package in sorted({name for versions in told.values() for name in versions}):
        ranks: dict[str, list[int]] = {}
        for rank, versions in told.items():
            ranks.setdefault(versions.get(package, "none"), []).append(rank)
        if len(ranks) > 1:
            differing.append(f"{package} " + ", ".join(f"{found} ({_names(who)})" for found, who in ranks.items()))
    if differing:
        return failed("versions", f"not the same everywhere: {'; '.join(differing)}", "one environment on all machines")
    return ok("versions", "Python, packages and this project's code are the same on all ranks")


def _names(ranks: list[int]) -> str:
    """rank 3, ranks 0-7, ranks 0-2 and 5."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    texts = [f"{span[0]}-{span[1]}" if len(span) > 1 else str(span[0]) for span in spans]
    return f"rank{'s' * (len(ranks) > 1)} " + " and ".join(
        [", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts
    )


def _clocks(meeting: Meeting, now: Callable[[], float] = time.time) -> list[Check]:
    """Each rank's clock against rank 0's, from questions and answers through the store."""
    store, place = meeting.store, meeting.place
    if place.rank != 0:
        for i in range(PINGS):
            store.wait([f"ping/{place.rank}/{i}"], _LONG)
            store.set(f"pong/{place.rank}/{i}", repr(now()))
        return []
    skews: dict[int, tuple[float, float]] = {}
    for rank in range(1, place.world_size):
        rounds = []
        for i in range(PINGS):
            asked = now()
            store.set(f"ping/{rank}/{i}", "")
            store.wait([f"pong/{rank}/{i}"], timedelta(seconds=meeting.wait_s))
            answered = now()
            told = float(store.get(f"pong/{rank}/{i}"))
            rounds.append(((answered - asked) / 2, told - (asked + answered) / 2))
        doubt, skew = min(rounds)
        skews[rank] = (skew, doubt)
    return [clocks_agree(skews)]


def clocks_agree(skews: dict[int, tuple[float, float]]) -> Check:
    """
    Args:
        skews: of each rank but 0: how far its clock is ahead of rank 0's, and how far that may be off, in seconds.
    """
    rank, (skew, doubt) = max(skews.items(), key=lambda item: abs(item[1][0]))
    found = f"the furthest from rank 0's is rank {rank}'s: {1000 * skew:+,.1f} ms, give or take {1000 * doubt:,.1f}"
    if abs(skew) - doubt > SKEW_S:
        return warning("clocks", found, "set the clocks of all machines by NTP: timedatectl, chrony")
    return ok("clocks", found)


def _one_folder(meeting: Meeting, run_dir: str) -> list[Check]:
    """Whether all machines see the run folder of rank 0: a resume reads its checkpoints everywhere."""
    place = meeting.place
    if place.local_world_size == place.world_size:
        return []
    probe = ""
    path = nearest(Path(run_dir or "runs")) / f".dcgan-doctor-{os.getpid()}-{time.time_ns()}"
    try:
        if place.rank == 0:
            try:
                path.touch()
                probe = str(path)
            except OSError:
                probe = ""  # the look at the folder has said so
        probe = meeting.decide("probe", probe)
        meeting.tell("sees", Path(probe).exists() if probe else True)
        if place.rank != 0:
            meeting.decide("seen")
            return []
        seen = meeting.hear("sees")
        meeting.decide("seen")
    finally:
        if place.rank == 0:
            path.unlink(missing_ok=True)
    blind = [rank for rank, sees in seen.items() if not sees]
    if blind:
        found = f"{Path(probe).parent} of rank 0 is not what {_names(blind)} see there"
        return [failed("one run folder", found, "--run.dir on a disk that all machines mount, as an absolute path")]
    return [ok("one run folder", "all ranks see the same")] if probe else []


def _measured(meeting: Meeting) -> dict[str, Any]:
    """Join the group as training does; each size's median milliseconds, or what went wrong."""
    import torch
    import torch.distributed as dist

    from pipeline import distributed

    place = meeting.place
    device = distributed.from_environment().device
    on_gpu = device.type == "cuda"
    times = []
    try:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=meeting.wait_s),
            device_id=device if on_gpu else None,
        )
        for num_bytes, repeats in MESSAGES:
            ramp = torch.arange(num_bytes // 4, device=device, dtype=torch.float32) % 1000
            found = ramp + place.rank
            dist.all_reduce(found)  # also the warm-up
            ranks = place.world_size
            if not torch.equal(found, ramp * ranks + ranks * (ranks - 1) / 2):  # whole numbers: exact in float32
                return {"problem": f"the sum of {size(num_bytes)} over all ranks is wrong on rank {place.rank}"}
            taken = []
            for _ in range(repeats):
                begun = time.perf_counter()
                dist.all_reduce(found)
                if on_gpu:
                    torch.cuda.synchronize(device)
                taken.append(1000 * (time.perf_counter() - begun))
            times.append(statistics.median(taken))
        dist.destroy_process_group()
    except TROUBLE as error:
        return {"problem": first_line(error)}
    return {"problem": "", "ms": times}


def _judged(findings: Findings, told: dict[int, Any], meeting: Meeting) -> None:
    """What the ranks say of their all-reduces, as one check."""
    from pipeline.config import Config
    from pipeline.sizes import FLOAT, networks_of

    problems: dict[str, list[int]] = {}
    for rank in range(meeting.place.world_size):
        problem = told[rank]["problem"] if rank in told else "no answer"
        if problem:
            problems.setdefault(re.sub(r"\[enforce fail at [^]]*\] ", "", problem), []).append(rank)
    if problems:
        texts = [f"{_names(who)}: {problem}" for problem, who in problems.items()]
        advice = f"{_INTERFACES}; NCCL_DEBUG=INFO tells more"
        findings.checks.append(failed("all-reduce", "; ".join(texts[:3]), advice))
        return
    texts = []
    for (num_bytes, _), ms in zip(MESSAGES, told[0]["ms"], strict=True):
        rate = num_bytes / 2**30 / (ms / 1000)
        findings.all_reduce.append({"bytes": num_bytes, "ms": round(ms, 4), "gib_per_s": round(rate, 4)})
        texts.append(
            f"{num_bytes >> 10} KiB {ms:.2f} ms" if num_bytes < 1 << 20 else f"{num_bytes >> 20} MiB {ms:.1f} ms"
        )
    networks = networks_of(Config())
    step = FLOAT * (networks.generator + networks.discriminator)
    seconds = step / 2**30 / findings.all_reduce[-1]["gib_per_s"]
    found = f"right; {', '.join(texts)} ({findings.all_reduce[-1]['gib_per_s']:.2f} GiB/s): "
    found += f"a step's {size(step)} of gradients take about {1000 * seconds:,.0f} ms"
    findings.checks.append(ok("all-reduce", found))
