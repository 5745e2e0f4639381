"""torchrun under launch/run.py: exit codes, signals, and nothing left behind, with a stand-in for the trainer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cli import run
from pipeline.cli.run import Outcome, Process

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

here, told = Path(__file__).parent, Path(os.environ["DCGAN_OUTCOME"])
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
mode = sys.argv[sys.argv.index("--run.dir") + 1]


def say(**values):
    aside = told / f".{rank}"
    aside.write_text(json.dumps(values | {"restart": restart, "pid": os.getpid()}))
    aside.rename(told / f"{rank}.json")


def end(state, code, reason=""):
    say(state=state, exit_code=code, reason=reason)
    sys.exit(0 if state == "preempted" else code)


def preempt(number, _frame):
    if mode == "deaf":
        (here / f"{rank}.heard").touch()
        return
    for ignored in handled:
        signal.signal(ignored, signal.SIG_IGN)
    time.sleep(0.3)  # a checkpoint takes its time; a launcher that ends before is caught
    end("preempted", 75, signal.Signals(number).name)


handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
for number in handled:
    signal.signal(number, preempt)
say(state="running")
orphan = mode == "orphan" and rank == 0
pid = subprocess.Popen(["sleep", "600"], start_new_session=True).pid if orphan else os.getpid()
(here / f".{rank}").write_text(str(pid))
(here / f".{rank}").rename(here / f"{rank}-{restart}.pid")
deadline = time.monotonic() + 120
while len(list(here.glob("*.pid"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
if mode == "fail" and rank == 1:
    end("failed", 65, "data.dataroot holds no image")
if mode == "hang":
    if rank == 0:
        os.kill(os.getppid(), signal.SIGSTOP)
    end("failed", 76, "loss_d is nan")
if mode == "killed" and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "again" and restart == 0:
    end("failed", 76, "that was before")
if mode in ("finish", "orphan", "again"):
    end("finished", 0)
while time.monotonic() < deadline:
    time.sleep(0.05)
"""


def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(pid: int) -> bool:
    return any(p.pid == pid and p.state not in "ZX" for p in run.process_table())


class Wrapped:
    """The wrapper around torchrun around two stand-ins, whose run.dir says what they do."""

    def __init__(self, folder: Path, mode: str, *torchrun_options: str, **environment: str) -> None:
        self.folder, self.said = folder, folder / "stderr"
        (folder / "train.py").write_text(STAND_IN)
        (folder / "temporary").mkdir()
        launcher = [sys.executable, str(ROOT / "launch/run.py"), "--standalone", "--nproc_per_node=2"]
        command = [*launcher, *torchrun_options, str(folder / "train.py"), "--run.dir", mode]
        environment = os.environ | {"TMPDIR": str(folder / "temporary")} | environment
        with self.said.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, cwd=folder, env=environment, start_new_session=True)

    def pids(self) -> list[int]:
        """Of the processes that the workers have named."""
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def started(self) -> Wrapped:
        until(lambda: len(self.pids()) == 2 or self.process.poll() is not None, "no worker has started")
        assert self.process.poll() is None, self.said.read_text()
        return self

    def torchrun(self) -> int:
        return next(p.pid for p in run.process_table() if p.parent == self.process.pid)

    def ended(self) -> tuple[int, list[str]]:
        """Exit code and the wrapper's own lines; fails where a process or a temporary folder is left."""
        code = self.process.wait(60)
        assert not [pid for pid in self.pids() if alive(pid)]
        assert not list((self.folder / "temporary").glob("dcgan-outcome-*"))
        lines = self.said.read_text().splitlines()
        return code, [line.removeprefix("run.py: ") for line in lines if line.startswith("run.py: ")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Wrapped]]:
    begun: list[Wrapped] = []

    def begin(*arguments: str, **environment: str) -> Wrapped:
        begun.append(Wrapped(tmp_path, *arguments, **environment))
        return begun[-1]

    yield begin
    for wrapped in begun:  # still there only where the test has failed
        below = run.descendants(wrapped.process.pid, run.process_table())
        for pid in [process.pid for process in below] + [wrapped.process.pid] * (wrapped.process.poll() is None):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wrapped.process.wait()


def write_status(path: Path, **status: object) -> Path:
    path.parent.mkdir()
    path.write_text(json.dumps(status))
    return path


def test_a_run_that_finishes_is_0_and_says_nothing(start):
    assert start("finish").ended() == (0, [])


def test_the_code_of_the_rank_that_met_the_cause_is_the_runs(start):
    assert start("fail").ended() == (65, ["failed with 65 (data): rank 1: data.dataroot holds no image"])


@pytest.mark.parametrize("sent", [("SIGTERM", "SIGINT"), ("SIGUSR1",), ("SIGHUP",)])
def test_a_signal_reaches_the_workers_and_a_preempted_run_is_75(start, sent):
    wrapped = start("train").started()
    for name in sent:  # two at once are one request, and the kernel hands over either first
        wrapped.process.send_signal(signal.Signals[name])
    heard = ["SIGTERM" if name == "SIGHUP" else name for name in sent]
    assert wrapped.ended() in [(75, [f"preempted ({name}); the same command goes on"]) for name in heard]


def test_a_terminals_interrupt_reaches_torchrun_once(start):
    wrapped = start("train").started()
    os.killpg(wrapped.process.pid, signal.SIGINT)  # as Ctrl-C does: everything in the terminal's foreground
    assert wrapped.ended() == (75, ["preempted (SIGINT); the same command goes on"])


def test_the_second_request_kills_at_once(start, tmp_path):
    status = write_status(tmp_path / "deaf/status.json", state="running")
    wrapped = start("deaf").started()
    wrapped.process.send_signal(signal.SIGTERM)
    until(lambda: len(list(tmp_path.glob("*.heard"))) == 2, "the first signal has not arrived")

    def gone() -> bool:
        wrapped.process.send_signal(signal.SIGINT)  # within the first second this is the same request
        return wrapped.process.poll() is not None

    until(gone, "the second request was not heard", seconds=20)  # torchrun alone would wait for 30
    assert wrapped.ended() == (128 + signal.SIGINT, ["SIGTERM and then SIGINT: killed everything"])
    assert json.loads(status.read_text())["state"] == "failed"


def test_torchrun_that_does_not_end_in_time_is_killed_and_status_tells(start, tmp_path):
    status = write_status(tmp_path / "deaf/status.json", state="running", images_seen=640)
    wrapped = start("deaf", DCGAN_GRACE_S="1").started()
    wrapped.process.send_signal(signal.SIGTERM)
    why = "torchrun had not ended 1 s after SIGTERM"
    reason = f"ranks 0, 1 were killed ({why})"
    assert wrapped.ended() == (1, [f"{why}: killed everything", f"failed with 1: {reason}"])
    assert json.loads(status.read_text()) == {"state": "failed", "images_seen": 640, "exit_code": 1, "reason": reason}


def test_a_killed_rank_is_named_where_nobody_else_could(start, tmp_path):
    status = write_status(tmp_path / "killed/status.json", state="running", checkpoint="images-000000640")
    assert start("killed").ended() == (1, ["failed with 1: rank 0 was killed"])
    kept = {"state": "failed", "checkpoint": "images-000000640", "exit_code": 1, "reason": "rank 0 was killed"}
    assert json.loads(status.read_text()) == kept
    assert list(status.parent.iterdir()) == [status]


def test_an_orphan_in_a_session_of_its_own_is_killed_and_named(start):
    wrapped = start("orphan")
    code, said = wrapped.ended()
    orphan = (wrapped.folder / "0-0.pid").read_text()
    assert (code, said) == (0, [f"killed what was left behind: sleep 600 (pid {orphan})"])


def test_a_stuck_torchrun_whose_workers_have_failed_is_killed(start):
    why = "torchrun had not ended 1 s after its last worker: killed everything"
    assert start("hang", DCGAN_GRACE_S="1").ended() == (76, [why, "failed with 76 (diverged): loss_d is nan"])


def test_workers_of_a_killed_torchrun_are_killed_and_named(start):
    wrapped = start("train").started()
    os.kill(wrapped.torchrun(), signal.SIGKILL)
    code, (left, said) = wrapped.ended()
    assert (code, said) == (1, "failed with 1: ranks 0, 1 were killed")
    assert left.startswith("killed what was left behind: ")
    assert all(f"(pid {pid})" in left for pid in wrapped.pids())


def test_workers_of_a_killed_wrapper_are_preempted(start):
    wrapped = start("train").started()
    torchrun = wrapped.torchrun()
    wrapped.process.kill()
    assert wrapped.process.wait(10) == -signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in (torchrun, *wrapped.pids())), "torchrun or its workers live on")
    (told,) = (wrapped.folder / "temporary").glob("dcgan-outcome-*")
    assert [(o.state, o.reason) for o in run.read_outcomes(told)] == [("preempted", "SIGTERM")] * 2


def test_what_failed_before_a_restart_is_forgotten(start):
    assert start("again", "--max-restarts=1").ended() == (0, [])


def test_the_script_parts_the_command_line():
    for before, after in (
        ("", "launch/train.py"),
        ("--standalone", "train.py --dry-run"),
        ("--nnodes 2", "/a/train.py b/train.py"),
        ("--log-dir=x/train.py", "./train.py"),
    ):
        assert run.split([*before.split(), *after.split()]) == (before.split(), after.split())


@pytest.mark.parametrize(
    ("argv", "grace", "named"),
    [
        *[(argv, "1", "launch/train.py") for argv in ("", "--standalone", "launch/sample.py run", "retrain.py")],
        ("train.py --run.drr x", "1", "run.dir"),
        ("train.py --optim.lr -1", "1", "optim.lr"),
        *[("train.py", grace, f"above 0, got {grace!r}") for grace in ("soon", "0", "-1", "nan", "inf", "")],
    ],
)
def test_a_wrong_command_line_is_one_line_and_2_before_anything_starts(capfd, monkeypatch, argv, grace, named):
    monkeypatch.setenv("DCGAN_GRACE_S", grace)
    assert run.main(argv.split()) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("run.py: error: ")
    assert named in said


def test_it_refuses_to_be_started_by_the_torchrun_that_it_would_start_itself(capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run.main(["--standalone", "launch/train.py", "--data.dataroot", "faces"]) == 2
    assert (
        capfd.readouterr().err
        == "run.py: error: run.py starts torchrun itself, got one around it; start it with python\n"
    )


def test_help_is_the_wrappers_alone_and_the_trainers_after_its_script(capsys):
    assert run.main(["--help"]) == 0
    assert "DCGAN_GRACE_S" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run.main(["--standalone", "train.py", "--help"])
    assert ended.value.code == 0
    assert "--run.dir" in capsys.readouterr().out


def test_the_users_signals_come_after_ours_so_that_torchrun_obeys_them():
    assert run.torchrun_command(["--signals-to-handle", "SIGTERM"], ["train.py", "--dry-run"], {})[1:] == [
        *["-m", "torch.distributed.run", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"],
        *["--signals-to-handle", "SIGTERM", "train.py", "--dry-run"],
    ]
    assert "--signals-to-handle" not in run.torchrun_command([], ["train.py"], {"PET_SIGNALS_TO_HANDLE": "SIGTERM"})


@pytest.mark.parametrize(
    ("options", "environment", "restarts"),
    [
        ("--standalone", {}, False),
        ("--max-restarts 0", {}, False),
        ("--max-restarts 3", {}, True),
        ("--max_restarts=3", {}, True),
        ("--max-rest=3", {}, True),
        ("--max-restarts=3 --max-restarts=0", {}, False),
        ("--master_addr 3", {}, False),
        ("", {"PET_MAX_RESTARTS": "2"}, True),
        ("--max-restarts 0", {"PET_MAX_RESTARTS": "2"}, False),
    ],
)
def test_restarts_are_read_as_torchrun_reads_them(options, environment, restarts):
    assert run.may_restart(options.split(), environment) is restarts


def node(*said: str) -> list[Outcome]:
    """Workers by rank, each as its state, exit code and reason."""
    found = []
    for rank, text in enumerate(said):
        state, code, *reason = text.split(maxsplit=2)
        found.append(Outcome(rank, state, 0, int(code), " ".join(reason)))
    return found


FINISHED, FAILED, PREEMPTED, RUNNING = "finished 0", "failed 1 why", "preempted 75 SIGTERM", "running 0"


@pytest.mark.parametrize(
    ("said", "torchrun", "status", "code"),
    [
        ([], 0, "", 0),
        ([], 1, "", 1),
        ([FINISHED, FINISHED], 0, "finished", 0),
        ([FINISHED, FINISHED], 1, "finished", 1),
        ([FINISHED, RUNNING], 0, "finished", 1),
        (["failed 2 why"], 1, "", 2),
        ([FAILED, "failed 65 why"], 1, "running", 65),
        ([RUNNING, "failed 74 why"], 1, "running", 74),
        ([PREEMPTED, "failed 76 why"], 1, "preempted", 76),
        (["failed 76 why", "failed 2 why"], 1, "", 76),
        (["failed 130 interrupted"], 1, "", 1),
        ([PREEMPTED, PREEMPTED], 0, "preempted", 75),
        ([PREEMPTED, PREEMPTED], 1, "preempted", 75),
        ([PREEMPTED, FINISHED], 0, "", 75),
        ([PREEMPTED, FAILED], 1, "preempted", 75),
        ([PREEMPTED, FAILED], 1, "running", 1),
        ([FAILED, PREEMPTED], 1, "failed", 1),
        ([PREEMPTED, RUNNING], 1, "preempted", 75),
        ([RUNNING, PREEMPTED], 1, "running", 1),
        ([RUNNING, RUNNING], 1, "preempted", 1),
    ],
)
def test_the_exit_code_follows_from_what_the_workers_said(said, torchrun, status, code):
    assert run.exit_code(node(*said), torchrun, {"state": status}) == code


@pytest.mark.parametrize(
    ("code", "said", "torchrun", "reason"),
    [
        (1, [], 1, "torchrun ended with 1 before any worker had started; what it said itself stands above"),
        (1, [], -9, "torchrun ended by SIGKILL before any worker had started; what it said itself stands above"),
        (1, [FINISHED], 1, "torchrun ended with 1"),
        (1, [RUNNING, FINISHED], 1, "rank 0 was killed"),
        (1, [RUNNING, RUNNING], 1, "ranks 0, 1 were killed"),
        (1, ["failed 1 connection reset", RUNNING], 1, "rank 1 was killed; rank 0: connection reset"),
        (65, [RUNNING, "failed 65 no image"], 1, "rank 1: no image; rank 0 was killed"),
        (2, ["failed 2 no key", "failed 2 no key"], 1, "no key"),
        (75, [PREEMPTED, RUNNING], 1, "rank 0: SIGTERM"),
        (75, ["preempted 75", "preempted 75"], 1, ""),
    ],
)
def test_the_reason_names_the_cause_first(code, said, torchrun, reason):
    assert run.explain(code, node(*said), torchrun, {}) == reason


def test_status_gives_the_reason_where_the_workers_give_none():
    status = {"exit_code": 1, "reason": "the disk\nis full"}
    assert run.explain(1, node("failed 1"), 1, status) == "the disk is full"
    assert run.explain(65, node("failed 65"), 1, status) == "torchrun ended with 1", "it is of another end"
    assert "full" not in run.explain(1, [], 1, status), "nobody has written it in this run"


def test_only_the_last_restart_counts():
    outcomes = [Outcome(0, "failed", 0, 76), Outcome(1, "finished", 2), Outcome(2, "failed", 1, 1)]
    assert run.latest(outcomes) == [outcomes[1]]
    assert run.latest([]) == []


def test_patience_with_a_stuck_torchrun_is_short_only_where_it_is_over():
    for said in ([FAILED, FINISHED], [RUNNING, FINISHED]):
        assert run.patience_s(node(*said), restarts=False, grace_s=90) == 90
        assert run.patience_s(node(*said), restarts=True, grace_s=90) == 600
    for said in ([FINISHED], [PREEMPTED, FINISHED]):
        assert run.patience_s(node(*said), restarts=False, grace_s=90) == 600
    # All have saved and left: torchrun only waits for a node that may be gone.
    assert run.patience_s(node(PREEMPTED, PREEMPTED), restarts=True, grace_s=90) == run.LEFT_S


def test_outcomes_are_read_by_rank_and_a_file_that_is_none_counts_as_silence(tmp_path):
    said = {"state": "finished", "restart": 1, "exit_code": 0, "reason": "", "pid": 7}
    (tmp_path / "10.json").write_text(json.dumps(said))
    (tmp_path / "9.json").write_text('{"state": "fin')
    (tmp_path / "2.json.tmp").write_text("{}")
    (tmp_path / ".3.json").write_text("{}")
    assert run.read_outcomes(tmp_path) == [Outcome(9), Outcome(10, "finished", 1)]
    assert run.read_outcomes(tmp_path)[0].silent


def test_descendants_are_the_living_of_all_generations():
    table = [Process(2, 1, "S"), Process(3, 2, "Z"), Process(4, 3, "R"), Process(5, 1, "S"), Process(6, 5, "S")]
    assert {p.pid for p in run.descendants(1, table)} == {2, 4, 5, 6}
    assert {p.pid for p in run.descendants(1, table, frozenset({5}))} == {2, 4}
    assert run.descendants(6, table) == []


def test_the_wrapper_starts_without_torch():
    probe = "import sys, pipeline.cli.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0
