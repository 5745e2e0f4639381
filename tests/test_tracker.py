"""Weights & Biases: the same numbers as TensorBoard, and nothing that it does slows or ends training.

Most tests put a small `wandb` of their own in the place of the real one, which notes its calls; one runs the real one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline import tracker as trackers
from pipeline.config import Config, ConfigError, LogConfig
from pipeline.meters import Log, Progress
from pipeline.runfolder import RunFolder
from pipeline.tracker import Tracker, open_tracker, require_wandb
from tests.commands import ROOT, descendants, wait_for
from tests.test_meters import ROW

FAKE = """
import json, os, sys, time

BEHAVIOUR = os.environ.get("FAKE_BEHAVIOUR", "")

def note(**call):
    with open(os.environ["FAKE_NOTES"], "a") as file:
        file.write(json.dumps(call) + "\\n")

def wait_for_ever():
    while True:
        time.sleep(1)

class Error(Exception):
    pass

def Settings(**settings):
    return settings

class Image:
    def __init__(self, picture):
        self.size = picture.size

class Run:
    def __init__(self, offline):
        self.offline = offline

    def log(self, values, step):
        if BEHAVIOUR == "dies":
            raise RuntimeError("a mistake of the package")
        note(step=step, **{k: v.size if isinstance(v, Image) else v for k, v in values.items()})

    def alert(self, title, text):
        note(alert=text)

    def finish(self, exit_code):
        if BEHAVIOUR == "never finishes":
            wait_for_ever()
        note(finish=exit_code)

def init(mode, settings, **options):
    if BEHAVIOUR == "never starts":
        wait_for_ever()
    if BEHAVIOUR == "refuses" or (BEHAVIOUR == "out of reach" and mode == "online"):
        raise Error("no such host\\nand more")
    note(init=mode, reporting=os.environ.get("WANDB_ERROR_REPORTING"), **options)
    return Run(mode == "offline")
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the small `wandb` notes its calls, a line each."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def calls(notes: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


@contextlib.contextmanager
def opened(folder: Path, mode: str = "offline") -> Iterator[Tracker]:
    run = RunFolder(folder)
    run.prepare()
    tracker = open_tracker(Config(log=LogConfig(wandb=mode)), run)  # type: ignore[arg-type]
    assert tracker is not None
    try:
        yield tracker
    finally:
        tracker.close()


def test_points_and_pictures_are_those_of_tensorboard(tmp_path: Path, notes: Path) -> None:
    with opened(tmp_path / "run") as tracker:
        log = Log(tmp_path / "run", Progress(0, 400, 100), io.StringIO(), tracker)
        log.picture("fakes", Image.new("RGB", (5, 4)), 0)
        log.write(ROW | {"images_seen": 200}, Progress(200, 400, 100))
        log.event("collapse: D has won", 200)
        log.close()
    begin, picture, row, end = calls(notes)
    assert {
        "init": "offline",
        "project": "dcgan-faces",
        "name": "run",
        "dir": str(tmp_path / "run"),
    }.items() <= begin.items()
    assert begin["config"]["train"]["batch_size"] == 128  # type: ignore[index]
    assert picture == {"step": 0, "fakes": [5, 4]}
    assert {"step": 200, "Loss/D": 1.25, "D(x)": 0.75, "Progress/learning_rate": 2e-4}.items() <= row.items()
    assert "Loss/G" not in row, "it is NaN, and stands as a gap"
    assert end == {"finish": 0}
    assert not list((tmp_path / "run" / "wandb").glob("*.png"))


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_only_online_lets_the_package_call_home_and_send_alerts(tmp_path: Path, notes: Path, mode: str) -> None:
    with opened(tmp_path / "run", mode) as tracker:
        tracker.event("a slow rank", 8)
    begin, *rest, _ = calls(notes)
    assert (begin["init"], begin["reporting"]) == (mode, "false" if mode == "offline" else None)
    assert rest == ([{"alert": "a slow rank"}] if mode == "online" else [])


def test_a_resumed_run_goes_on_under_its_id_and_one_begun_anew_does_not(tmp_path: Path, notes: Path) -> None:
    for _ in range(2):
        with opened(tmp_path / "run", "online"):
            pass
    assert RunFolder(tmp_path / "run").move_aside() is None, "it has made no step yet"
    (tmp_path / "run" / "stats.jsonl").touch()
    assert RunFolder(tmp_path / "run").move_aside() is not None
    with opened(tmp_path / "run", "online"):
        pass
    first, second, third = [call for call in calls(notes) if "init" in call]
    assert first["id"] == second["id"] != third["id"]
    assert first["resume"] == "allow"
    assert RunFolder(tmp_path / "run").status["wandb_id"] == third["id"]


def test_a_missing_package_is_one_line_and_off_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves behind where it is used
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for mode in ("offline", "online"):
        with pytest.raises(ConfigError, match=rf"log\.wandb is {mode}, and .* pip install -e '\.\[wandb\]'"):
            require_wandb(LogConfig(wandb=mode))  # type: ignore[arg-type]
    require_wandb(LogConfig())
    assert open_tracker(Config(), RunFolder(tmp_path / "run")) is None
    assert not (tmp_path / "run").exists()


def test_a_project_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"log\.wandb_project must be a name, got ''"):
        LogConfig(wandb_project="")


def test_out_of_reach_the_run_is_kept_offline_and_a_line_says_so(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", "out of reach")
    stream = io.StringIO()
    with opened(tmp_path / "run", "online") as tracker:
        wait_for(lambda: calls(notes), "the run to begin")
        log = Log(tmp_path / "run", Progress(0, 8, 8), stream, tracker)
        log.write(ROW | {"images_seen": 8}, Progress(8, 8, 8))
        log.close()
    assert stream.getvalue().splitlines()[0] == (
        "Weights & Biases cannot be reached (no such host and more); this start of the run is kept offline"
    )
    assert [call.get("init") for call in calls(notes)] == ["offline", None, None]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("refuses", r"Weights & Biases cannot start (no such host and more); training goes on without it"),
        ("dies", r"Weights & Biases ended with 1, see RUN/wandb/tracker.log; training goes on without it"),
    ],
)
def test_where_it_fails_one_line_says_so_and_the_log_goes_on(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", behaviour)
    heard: list[str] = []
    with opened(tmp_path / "run") as tracker:
        seen = 0

        def tell() -> list[str]:
            nonlocal seen
            seen += 8
            tracker.log({"Loss/D": 1.0}, seen)
            tracker.picture("fakes", Image.new("RGB", (5, 4)), seen)
            heard.extend(tracker.news())
            return heard

        wait_for(tell, "a line")
        tell()
    assert [line.replace(str(tmp_path / "run"), "RUN") for line in heard] == [said]
    assert not list((tmp_path / "run" / "wandb").glob("*.png"))
    traceback = (tmp_path / "run" / "wandb" / "tracker.log").read_text()
    assert ("a mistake of the package" in traceback) == (behaviour == "dies")


def test_a_process_that_cannot_be_made_is_told(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with opened(tmp_path / "run") as tracker:
        tracker.log({"Loss/D": 1.0}, 8)
        tracker.picture("fakes", Image.new("RGB", (5, 4)), 8)
        assert tracker.close() == [
            "Weights & Biases cannot start (No such file or directory); training goes on without it"
        ]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("never finishes", "was not done 0.3 s after training and was ended; `wandb sync"),
        ("never starts", "had not begun when training ended"),
    ],
)
def test_one_that_never_ends_is_ended(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", behaviour)
    with opened(tmp_path / "run", "online") as tracker:
        if behaviour == "never finishes":
            wait_for(lambda: calls(notes), "the run to begin")
        monkeypatch.setattr(trackers, "FINISH_S", 0.3)
        tracker.picture("fakes", Image.new("RGB", (5, 4)), 8)
        (line,) = tracker.close()
        assert said in line
        assert tracker.close() == []
    assert not list((tmp_path / "run" / "wandb").glob("*.png"))


def test_one_that_takes_nothing_makes_nobody_wait(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", "never starts")
    monkeypatch.setattr(trackers, "MAX_WAITING_BYTES", 100_000)
    monkeypatch.setattr(trackers, "FINISH_S", 0.3)
    with opened(tmp_path / "run") as tracker:
        start = time.monotonic()
        for seen in range(20_000):
            tracker.log({"Loss/D": 1.0, "Loss/G": 2.0}, seen)
        assert time.monotonic() - start < 60, "it waited"
        lines = tracker.close()
    assert any("points and pictures, which it lacks" in line for line in lines)


def test_signals_to_everyone_are_left_to_the_trainer(tmp_path: Path, notes: Path) -> None:
    """A scheduler may signal all processes of a job; the trainer still has something to say."""
    with opened(tmp_path / "run") as tracker:
        wait_for(lambda: calls(notes), "the run to begin")
        assert tracker._process is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(tracker._process.pid, number)
        tracker.log({"Loss/D": 1.0}, 8)
        assert tracker.close() == []
    assert calls(notes)[1:] == [{"step": 8, "Loss/D": 1.0}, {"finish": 0}]


def test_a_killed_trainer_leaves_no_process_and_a_failed_run(tmp_path: Path, notes: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline.tracker import Tracker
tracker = Tracker(Path({str(tmp_path / "run")!r}), online=False, run_id="a", project="p", config={{}})
tracker.log({{"Loss/D": 1.0}}, 8)
print(tracker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for(lambda: not Path("/proc", done.stdout.strip()).exists(), "the other process to end")
    assert calls(notes)[1:] == [{"step": 8, "Loss/D": 1.0}, {"finish": 1}]


def test_the_real_package_writes_its_files_offline_and_opens_no_connection(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    seen: set[int] = set()
    found: set[str] = set()

    def look() -> bool:
        """Note the processes below ours, and which internet sockets they hold."""
        mine = descendants(os.getpid())
        seen.update(mine)
        inet = {
            line.split()[9]
            for table in ("tcp", "tcp6", "udp", "udp6")
            for line in Path("/proc/net", table).read_text().splitlines()[1:]
        }
        for pid in mine:
            with contextlib.suppress(OSError):
                for handle in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = str(handle.readlink())
                        if target.startswith("socket:[") and target[8:-1] in inet:
                            found.add(f"{pid} {target}")
        return len(seen) >= 2 and bool(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")))

    with opened(tmp_path / "run") as tracker:
        tracker.picture("fakes", Image.new("RGB", (5, 4)), 0)
        tracker.log({"Loss/D": 1.0}, 8)
        wait_for(look, "the run's files")
        wait_for(lambda: look() and not list((tmp_path / "run" / "wandb").glob("*.png")), "the picture to be taken")
        assert tracker.close() == []
    run_id = RunFolder(tmp_path / "run").status["wandb_id"]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert b"Loss/D" in file.read_bytes()
    assert list(file.parent.glob("files/media/images/fakes_0_*.png"))
    assert not found
    wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in seen), "its processes to end")
