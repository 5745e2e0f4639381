"""A real Slurm on this machine: munged, slurmctld and two slurmd, as root, all of it in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.commands import ROOT, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
CPUS = 2
"""That each node claims to have."""

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdParameters=config_overrides
{nodes}
PartitionName=p Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty: there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons want root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not found (apt-get install slurm-wlm munge)" if absent else ""


class Cluster:
    """A running Slurm; its commands, and what they say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def said_by(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str, log: Path, **environment: str) -> str:
        """sbatch from the clone: the job's number, for one of an array NUMBER_TASK."""
        told = [f"--export=ALL,{','.join(f'{name}={value}' for name, value in environment.items())}"]
        return self.said_by("sbatch", "--parsable", f"--output={log}", *told, *words).strip()

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, BatchHost, ..."""
        words = self.said_by("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_soon(self, job: str) -> None:
        """A job that went back to the queue waits two minutes, unless someone says so.

        Not at once: a node refuses what starts in the second of the requeue ("already killed"), and the job fails.
        """
        self.said_by("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def wait_for_state(self, job: str, *states: str) -> dict[str, str]:
        wait_for(lambda: self.fields(job)["JobState"] in states, f"job {job} in {' or '.join(states)}")
        return self.fields(job)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Started in `folder`; at the end its jobs are cancelled and every process of it is gone."""
    for name in ("munge", "state", "log", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    for parent in (folder / "munge", *(folder / "munge").parents):  # munged wants its socket's folder open to all
        parent.chmod(parent.stat().st_mode | 0o011)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} State=UNKNOWN"
        for node, port in zip(NODES, node_ports, strict=True)
    )
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(host=host, controller_port=controller_port, folder=folder, nodes=nodes, names=",".join(NODES))
    )
    cluster = Cluster(folder)
    munge = [f"--{option}={folder}/munge/{option}" for option in ("socket", "key-file", "pid-file", "log-file")]
    munge[1] = f"--key-file={key}"
    daemons: list[subprocess.Popen] = []

    def start(name: str, *words: str) -> None:
        with (folder / "log" / name).open("w") as output:
            daemons.append(
                subprocess.Popen(
                    words, env=cluster.environment, stdout=output, stderr=output, start_new_session=True
                )
            )  # fmt: skip

    def nodes_are_idle() -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment, capture_output=True, text=True
        )
        return done.stdout.split() == ["idle"] * len(NODES)

    try:
        start("munged", "munged", "--foreground", *munge, f"--seed-file={folder}/munge/seed")
        wait_for((folder / "munge/socket").exists, "munged's socket", daemons[-1])
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            start(node, "slurmd", "-D", "-N", node)
        wait_for(nodes_are_idle, f"idle nodes; see {folder}/log", daemons[1])
        yield cluster
    finally:
        _end(cluster, daemons)


def _end(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Cancel what runs, then end the daemons, then whatever else they have started."""
    if daemons:
        subprocess.run(
            ["scancel", "--state=PENDING,RUNNING,SUSPENDED", "--user=root"],
            env=cluster.environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    deadline = time.monotonic() + 20
    while left := processes_of(cluster):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"not gone: {left}"
        time.sleep(0.05)


def processes_of(cluster: Cluster) -> list[int]:
    """Everything that was started with this cluster's configuration: daemons, step managers, jobs."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens at now; all are held until the last is found, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
