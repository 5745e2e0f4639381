"""launch/run.py: torchrun with an exit code that a scheduler can act on.

    python launch/run.py [torchrun options] launch/train.py [trainer options]
    python launch/run.py --standalone --nproc_per_node=8 launch/train.py --config configs/celeba64.yaml

Starts torchrun with the same options, passes signals on, leaves no process behind, and ends with the run's outcome:
0 done, 2 config, 65 data, 74 input or output, 75 preempted (the same command goes on), 76 diverged, 1 anything else.
The first SIGTERM, SIGINT, SIGQUIT, SIGUSR1 or SIGHUP (as SIGTERM) goes to torchrun, which hands it to its workers; one
that comes more than a second later kills everything at once.

Environment:
    DCGAN_GRACE_S  Seconds that torchrun may take to end after a signal, or after its last worker where one has
                   failed, before it is killed.  Above 0; default 90.
    DCGAN_OUTCOME  Set for the workers: a folder in which each keeps <global rank>.json up to date, whole at all times:
                   state (running | preempted | failed | finished), restart, and at its end exit_code and reason.

Linux only: processes are found in /proc, and orphans come to their subreaper (prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import command
from pipeline.cli.options import parse
from pipeline.config import ConfigError
from pipeline.errors import StorageError
from pipeline.files import read_object, write_in_place_if_full

NAME = "run.py"
SCRIPT = "train.py"

PREEMPTED = 75
KINDS = {2: "config", 65: "data", 74: "input or output", 76: "diverged"}
"""Exit codes that say it all: one rank's is the run's."""

TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST_S = 1.0
"""Slurm and terminals send several signals for one request."""
EXIT_BARRIER_S = 600.0
"""How long an agent without workers may wait for other nodes; torchrun's own barrier gives up after 300."""
LEFT_S = 5.0
"""How long torchrun may stay when all workers have saved and left: on a node that was not itself told to stop it waits
in its exit barrier for the one that was and is gone (306 s, 2026-11)."""
NOW_S, SURELY_S = 1.0, 10.0
"""How long killed processes are waited for: when someone insists, and otherwise."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(argv: list[str] | None = None) -> int:
    """Train under torchrun; the exit code is the run's outcome, told in one line where it is not 0."""
    given = sys.argv[1:] if argv is None else argv
    if given in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    codes: list[int] = []
    return command.run(NAME, lambda: codes.append(_train(given))) or codes[0]


def _train(argv: Sequence[str]) -> int:
    torchrun_options, trainer = split(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(f"{NAME} starts torchrun itself, got one around it; start it with python")
    folder = parse(trainer[1:]).run_folder  # --help and --print_config end here
    grace_s = read_grace_s(os.environ)
    if sys.platform != "linux":
        raise ConfigError(f"{NAME} needs Linux, got {sys.platform}: start torchrun itself")
    try:
        outcome_folder = tempfile.TemporaryDirectory(prefix="dcgan-outcome-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(f"cannot make a temporary folder: {error.strerror}") from None
    with outcome_folder as told:
        arguments = torchrun_command(torchrun_options, trainer, os.environ)
        torchrun = _Torchrun(
            arguments,
            Path(told),
            grace_s,
            restarts=may_restart(torchrun_options, os.environ),
            elastic=is_elastic(torchrun_options, os.environ),
        )
        try:
            insisted = torchrun.wait()
        finally:
            torchrun.leave_nothing()
        return _tell(torchrun, latest(read_outcomes(Path(told))), folder / "status.json", insisted)


def _tell(torchrun: _Torchrun, outcomes: list[Outcome], status_path: Path, insisted: signal.Signals | None) -> int:
    """The exit code, after one line about it, and after status.json says what a killed rank 0 could not."""
    status = read_object(status_path)
    code = exit_code(outcomes, torchrun.process.returncode, status)
    if torchrun.asked and not outcomes and not torchrun.killed_because:
        code = PREEMPTED  # told to stop before any worker had begun: there is nothing to save, and nothing failed
    reason = explain(code, outcomes, torchrun.process.returncode, status, torchrun.killed_because)
    if status.get("state") == "running" and any(o.rank == 0 and o.silent for o in outcomes):
        try:
            text = json.dumps(status | {"state": "failed", "exit_code": code, "reason": reason}, indent=1) + "\n"
            write_in_place_if_full(status_path, text)
        except (OSError, StorageError) as error:
            _say(str(error))
    if insisted is not None:
        return 128 + insisted
    if code == PREEMPTED:
        _say(f"preempted{f' ({reason})' if reason else ''}; the same command goes on")
    elif code:
        _say(f"failed with {code}{f' ({KINDS[code]})' if code in KINDS else ''}: {reason}")
    return code


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """torchrun's options; the trainer's script and its options.

    Raises:
        ConfigError: no argument is a file train.py.
    """
    for i, argument in enumerate(argv):
        if not argument.startswith("-") and Path(argument).name == SCRIPT:
            return list(argv[:i]), list(argv[i:])
    other = next((a for a in argv if a.endswith(".py") and not a.startswith("-")), "none")
    raise ConfigError(f"launch/{SCRIPT} and its options must follow torchrun's options, got {other}")


def torchrun_command(options: Sequence[str], trainer: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What is started.  torchrun obeys the last of equal options, so the user's --signals-to-handle wins over ours."""
    handle = [] if "PET_SIGNALS_TO_HANDLE" in environment else ["--signals-to-handle", TORCHRUN_SIGNALS]
    return [sys.executable, "-m", "torch.distributed.run", *handle, *options, *trainer]


def may_restart(options: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether torchrun was told to restart failed workers: --max-restarts in any spelling that it takes."""
    value = environment.get("PET_MAX_RESTARTS", "")
    for i, option in enumerate(options):
        name, equals, attached = option.replace("_", "-").partition("=")
        if name.startswith("--max") and "--max-restarts".startswith(name):
            value = attached if equals else "".join(options[i + 1 : i + 2])
    return value.strip() not in ("", "0")


def is_elastic(options: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether torchrun was given a range of nodes, --nnodes MIN:MAX: it restarts its workers when a node comes."""
    value = environment.get("PET_NNODES", "")
    for i, option in enumerate(options):
        name, equals, attached = option.partition("=")
        if name.startswith("--nn") and "--nnodes".startswith(name):
            value = attached if equals else "".join(options[i + 1 : i + 2])
    return len(set(value.split(":"))) > 1


def read_grace_s(environment: Mapping[str, str]) -> float:
    """DCGAN_GRACE_S in seconds.

    Raises:
        ConfigError: it is no number above 0.
    """
    text = environment.get("DCGAN_GRACE_S", "90")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"DCGAN_GRACE_S must be a number of seconds above 0, got {text!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one worker of this node has said last."""

    rank: int
    state: str = "running"
    restart: int = 0
    exit_code: int = 0
    reason: str = ""

    @property
    def silent(self) -> bool:
        """Once all workers are gone: it ended without a word, so something killed it."""
        return self.state == "running"


def read_outcomes(folder: Path) -> list[Outcome]:
    """All of a folder, by rank."""
    found = []
    for number in sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()):
        said = read_object(folder / f"{number}.json")
        found.append(
            Outcome(
                said.get("rank", number),
                **{f.name: said[f.name] for f in dataclasses.fields(Outcome)[1:] if f.name in said},
            )
        )
    return found


def latest(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of the last restart; earlier ones are history."""
    last = max((o.restart for o in outcomes), default=0)
    return [o for o in outcomes if o.restart == last]


def exit_code(outcomes: Sequence[Outcome], torchrun_code: int, status: Mapping[str, Any]) -> int:
    """The run's exit code from what this node's workers said, how torchrun ended, and status.json."""
    for outcome in outcomes:
        if outcome.exit_code in KINDS:
            return outcome.exit_code
    if any(o.state == "preempted" for o in outcomes):
        # Ranks that fail or fall silent while the others are preempted may have lost a race: rank 0 has the last word.
        broken = any(o.state == "failed" or o.silent for o in outcomes)
        return 1 if broken and status.get("state") != "preempted" else PREEMPTED
    return 0 if torchrun_code == 0 and all(o.state == "finished" for o in outcomes) else 1


def explain(
    code: int, outcomes: Sequence[Outcome], torchrun_code: int, status: Mapping[str, Any], killed_because: str = ""
) -> str:
    """Why it ended so, in one line; empty where nobody has said."""
    silent = [str(o.rank) for o in outcomes if o.silent]
    reasons = []
    if silent and code != PREEMPTED:
        were = "ranks {} were" if len(silent) > 1 else "rank {} was"
        reasons = [f"{were.format(', '.join(silent))} killed{f' ({killed_because})' if killed_because else ''}"]
    wanted = [o for o in outcomes if o.reason and (o.exit_code == code or (code == 1 and o.state == "failed"))]
    if wanted:
        alike = all(o.reason == wanted[0].reason for o in outcomes)
        said = wanted[0].reason if alike else f"rank {wanted[0].rank}: {wanted[0].reason}"
        # A rank that stopped for a reason of its own comes first; what follows from another's death, second.
        reasons.insert(0 if code in KINDS else len(reasons), said)
    if not reasons and outcomes and status.get("exit_code") == code and status.get("reason"):
        reasons = [str(status["reason"])]
    if not reasons and code != PREEMPTED:
        how = f"with {torchrun_code}" if torchrun_code >= 0 else f"by {signal.Signals(-torchrun_code).name}"
        before = "" if outcomes else " before any worker had started; what it said itself stands above"
        reasons = [killed_because or f"torchrun ended {how}{before}"]
    return " ".join("; ".join(reasons).split())


def patience_s(outcomes: Sequence[Outcome], *, restarts: bool, grace_s: float, elastic: bool = False) -> float:
    """How long torchrun may go on with no worker alive: not long when all it has left to do is to end."""
    last = latest(outcomes)
    if last and all(o.state == "preempted" for o in last):
        # Every rank has waited for the checkpoint before it said so; with a range of nodes torchrun may go on.
        return grace_s if elastic else min(LEFT_S, grace_s)
    over = not restarts and any(o.state == "failed" or o.silent for o in last)
    return grace_s if over else max(EXIT_BARRIER_S, grace_s)


@dataclasses.dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    state: str
    """As in proc(5): R, S, D, T; Z is dead and not yet waited for."""

    @property
    def name(self) -> str:
        """For people: the start of its command line."""
        words = b""
        with contextlib.suppress(OSError):  # it has just ended
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        line = " ".join(words.decode(errors="replace").replace("\0", " ").split())
        return f"{line[:60] or 'a process'} (pid {self.pid})"


def process_table() -> list[Process]:
    """All processes of the machine, or of this container."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            found.append(Process(int(path.name), int(parent), state))
    return found


def descendants(pid: int, table: Sequence[Process], without: frozenset[int] = frozenset()) -> list[Process]:
    """The living among a process's children, their children and so on; none of `without` or of theirs."""
    children: dict[int, list[Process]] = {}
    for process in table:
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    queue = [pid]
    while queue:
        more = [process for process in children.get(queue.pop(), []) if process.pid not in without]
        queue += [process.pid for process in more]
        found += more
    return [process for process in found if process.state not in "ZX"]


class _Torchrun:
    """torchrun and everything that it has started.  From here on signals wait until wait() looks at them."""

    def __init__(
        self, arguments: list[str], outcome_folder: Path, grace_s: float, *, restarts: bool, elastic: bool
    ) -> None:
        self.outcome_folder, self.grace_s, self.restarts, self.elastic = outcome_folder, grace_s, restarts, elastic
        self.killed_because = ""
        """Empty where torchrun has ended by itself."""
        self.asked = ""
        """The signal that was passed on; empty: none has come."""
        self._jobless_since: float | None = None
        # A shell may have started others before it became this program; they are none of ours.
        self._foreign = frozenset(p.pid for p in process_table() if p.parent == os.getpid())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as "ignore", it would hide how torchrun ended
        # What we were started to ignore (nohup, a shell's background job) stays ignored.
        self._requests = {s for s in PASSED_ON if signal.getsignal(s) != signal.SIG_IGN}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._requests | {signal.SIGCHLD})
        prctl, wrapper = ctypes.CDLL(None).prctl, os.getpid()
        prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            _say("prctl made this program no subreaper: should torchrun be killed, its workers may live on")

        def in_the_child() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # were this program killed, the workers still save
            if os.getppid() != wrapper:
                os._exit(1)

        self.process = subprocess.Popen(
            arguments,
            env=os.environ | {"DCGAN_OUTCOME": str(outcome_folder)},
            start_new_session=True,  # a terminal's Ctrl-C comes to it once, through us
            preexec_fn=in_the_child,
        )

    def wait(self) -> signal.Signals | None:
        """Until torchrun has ended or was killed; the signal of the one who insisted, where someone did."""
        look_s = min(5.0, max(0.02, self.grace_s / 20))
        asked = math.inf
        while not self._ended():
            got = signal.sigtimedwait(self._requests | {signal.SIGCHLD}, look_s)
            now = time.monotonic()
            if got is not None and got.si_signo != signal.SIGCHLD:
                request = signal.Signals(got.si_signo)
                if not self.asked:
                    self.asked, asked = request.name, now
                    # Not waited for yet, so the pid is still its own.
                    os.kill(self.process.pid, signal.SIGTERM if request == signal.SIGHUP else request)
                elif now - asked > SAME_REQUEST_S:
                    self._kill(f"{self.asked} and then {request.name}", NOW_S)
                    return request
            if now - asked >= self.grace_s:
                self._kill(f"torchrun had not ended {self.grace_s:g} s after {self.asked}", SURELY_S)
            elif (idle_s := self._jobless_s(now)) is not None:
                self._kill(f"torchrun had not ended {idle_s:.0f} s after its last worker", SURELY_S)
        return None

    def leave_nothing(self) -> None:
        """Kill what is left of torchrun's descendants, and name it."""
        if left := self._living():
            _say(f"killed what was left behind: {', '.join(process.name for process in left)}")
            self._kill_all(SURELY_S)

    def _ended(self) -> bool:
        """Take note of every child that has ended, orphans that came to us among them; whether torchrun has."""
        with contextlib.suppress(ChildProcessError):  # no child is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.process.pid:
                    self.process.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.process.returncode is not None

    def _living(self) -> list[Process]:
        """Looked for twice: one whose parent ends while the table is read hangs in the air once, then comes to us."""
        for _ in range(2):
            if found := descendants(os.getpid(), process_table(), self._foreign):
                return found
        return []

    def _jobless_s(self, now: float) -> float | None:
        """How long workers have been gone, once that is too long."""
        outcomes = read_outcomes(self.outcome_folder)
        if not outcomes or descendants(self.process.pid, process_table()):
            self._jobless_since = None
            return None
        self._jobless_since = self._jobless_since or now
        idle_s = now - self._jobless_since
        patient_s = patience_s(outcomes, restarts=self.restarts, grace_s=self.grace_s, elastic=self.elastic)
        return idle_s if idle_s >= patient_s else None

    def _kill(self, why: str, wait_s: float) -> None:
        _say(f"{why}: killed everything")
        self.killed_because = why
        self._kill_all(wait_s)
        if not self._ended():
            self.process.returncode = -signal.SIGKILL  # the kernel has not let go of it; nothing more can be done

    def _kill_all(self, wait_s: float) -> None:
        """SIGKILL to all descendants until none is left: one that forked meanwhile shows up in the next round."""
        deadline = time.monotonic() + wait_s
        while left := self._living():
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            self._ended()
            if time.monotonic() > deadline:
                _say(f"killed, but not gone: {', '.join(process.name for process in left)}")
                break
            signal.sigtimedwait({signal.SIGCHLD}, 0.01)
        self._ended()


def _say(text: str) -> None:
    """One line on stderr.  Unbuffered: text that a closed terminal refuses must not turn the exit code into 120."""
    with contextlib.suppress(OSError):
        os.write(2, f"{NAME}: {text}\n".encode(errors="backslashreplace"))
