"""Weights & Biases beside TensorBoard: the same scalars and pictures, sent by a process of its own.

The trainer only writes short lines into a pipe, and never waits for it: what the other process, W&B's service or the
network do with them can neither slow training nor end it.  That process ends when the pipe does, however the trainer
went.  One line says so where it cannot start, falls behind, or ends early; its errors are in RUN/wandb/tracker.log.

    Tracker in the trainer -> pipe of JSON lines -> python -m pipeline.tracker -> wandb -> RUN/wandb, if online W&B too
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError, LogConfig, to_dict

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.runfolder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
MAX_WAITING_BYTES = 1 << 20
"""Lines that wait for the other process, about 1,000 of them; those that follow are lost, and counted."""
START_S = 60
"""How long W&B may take to answer at the start of an online run; then it goes on offline."""
FINISH_S = 10.0
"""How long the trainer waits at its end for what is still to be sent: within the 30 s that torchrun gives workers."""
ORPHAN_S = 60
"""How long the other process goes on without the trainer, which was killed."""
STARTED = "started"
"""What the other process says when the run has begun."""


def require_wandb(cfg: LogConfig) -> None:
    """
    Raises:
        ConfigError: log.wandb asks for a package that is not installed.
    """
    if cfg.wandb != "off":
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # without an origin: a folder of that name
            raise ConfigError(f"log.wandb is {cfg.wandb}, and the package for it is missing: pip install -e '.[wandb]'")


def open_tracker(cfg: Config, folder: RunFolder) -> Tracker | None:
    """What log.wandb asks for; None where it is off.  For rank 0 only.

    The run's id at W&B is kept in status.json, so that a resumed run goes on under it, and one that begins anew
    (run.resume none) gets another.

    Raises:
        ConfigError: the package wandb is not installed.
    """
    require_wandb(cfg.log)
    if cfg.log.wandb == "off":
        return None
    run_id = str(folder.status.get("wandb_id") or secrets.token_hex(4))
    folder.update(wandb_id=run_id)
    return Tracker(
        folder.path,
        online=cfg.log.wandb == "online",
        run_id=run_id,
        project=cfg.log.wandb_project,
        config=to_dict(cfg),
    )


class Tracker:
    """One run at W&B.  Every method returns at once, but close()."""

    def __init__(self, run: Path, *, online: bool, run_id: str, project: str, config: dict[str, Any]) -> None:
        self.folder = run.resolve() / "wandb"
        self.online = online
        self._waiting = bytearray()
        self._lost = 0
        self._started = False
        self._pictures: list[Path] = []
        self._news: list[str] = []
        self._said = b""
        self._process: subprocess.Popen[bytes] | None = None
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        if not online:
            environment["WANDB_ERROR_REPORTING"] = "false"  # else W&B's service calls home, even offline (0.31)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "tracker.log").open("ab") as log:
                # A session of its own: Ctrl-C is for the trainer, who then ends this.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline.tracker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    bufsize=0, env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._news.append(f"Weights & Biases cannot start ({error.strerror}); training goes on without it")
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        start = {"online": online, "id": run_id, "project": project, "name": run.resolve().name, "config": config}
        self._send(start | {"folder": str(self.folder.parent)})

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """A point of each curve."""
        self._send({"at": images_seen, "values": values})

    def picture(self, tag: str, picture: Image.Image, images_seen: int) -> None:
        """A picture; its file lies in RUN/wandb until it is taken."""
        path = self.folder / f"{tag}-{images_seen:09d}.png"
        if self._process is not None:
            try:
                picture.save(path, compress_level=1)
            except OSError as error:
                self._news.append(f"Weights & Biases gets no picture: cannot write {path} ({error.strerror})")
            else:
                self._pictures.append(path)
                self._send({"at": images_seen, "tag": tag, "picture": str(path)})

    def event(self, text: str, images_seen: int) -> None:
        """Something that a person should know: an alert, where the run is online."""
        self._send({"at": images_seen, "event": text[:1000]})

    def news(self) -> list[str]:
        """Lines for a person that have come up since the last call."""
        if self._process is not None:
            code = self._process.poll()  # first: what it said before its end is then all there
            self._listen()
            if code is not None:
                if code:
                    where = self.folder / "tracker.log"
                    self._news.append(f"Weights & Biases ended with {code}, see {where}; training goes on without it")
                self._forget()
        news, self._news = self._news, []
        return news

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self._said += part
        *lines, self._said = self._said.split(b"\n")
        self._started |= STARTED.encode() in lines
        self._news += [line.decode(errors="replace") for line in lines if line != STARTED.encode()]

    def close(self) -> list[str]:
        """End the run at W&B and the process, within FINISH_S.  Returns the last news.  May be called twice."""
        process, deadline = self._process, time.monotonic() + FINISH_S
        if process is not None:
            self._send({"end": True})
            assert process.stdin is not None
            while self._waiting and process.poll() is None and time.monotonic() < deadline:
                select.select([], [process.stdin], [], 0.1)
                self._write()
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._listen()
                process.kill()
                process.wait()
                self._news.append(self._unfinished())
                self._forget()
            if self._lost:
                self._news.append(f"Weights & Biases was too slow for {self._lost} points and pictures, which it lacks")
        return self.news()

    def _unfinished(self) -> str:
        if not self._started:
            return "Weights & Biases had not begun when training ended; it has nothing of this start of the run"
        late = f"Weights & Biases was not done {FINISH_S:g} s after training and was ended"
        return f"{late}; `wandb sync {self.folder}/*run-*` sends what it has not got" if self.online else late

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if self._process is None:
            return
        if len(self._waiting) + len(line) > MAX_WAITING_BYTES:
            self._lost += 1
            return
        self._waiting += line
        self._write()

    def _write(self) -> None:
        """As much as the pipe takes now."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            while self._waiting:
                del self._waiting[: os.write(self._process.stdin.fileno(), self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended; news() tells
            self._waiting.clear()

    def _forget(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process = None
            self._waiting.clear()
            for path in self._pictures:  # those that were not taken
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


# The other process


def main() -> int:
    """Hands the lines of stdin to W&B; what a person should know goes to stdout, a line each."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the trainer says when it is over, by closing the pipe
    os.nice(5)
    lines = iter(sys.stdin.buffer)
    run = _start(json.loads(next(lines)))
    if run is not None:
        _tell(STARTED)
        ended = _pass_on(run, lines)
        signal.alarm(ORPHAN_S)
        run.finish(exit_code=0 if ended else 1)
    return 0


def _start(start: dict[str, Any]) -> Any:
    """The run, as wandb gives it; None where it cannot begin."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False, init_timeout=START_S,
        x_disable_stats=True, x_disable_meta=True,
    )  # fmt: skip
    options = {key: start[key] for key in ("id", "project", "name", "config")} | {"dir": start["folder"]}
    if start["online"]:
        try:
            return wandb.init(mode="online", resume="allow", settings=settings, **options)
        except wandb.Error as error:
            _tell(f"Weights & Biases cannot be reached ({_one_line(error)}); this start of the run is kept offline")
    try:
        return wandb.init(mode="offline", settings=settings, **options)
    except wandb.Error as error:
        _tell(f"Weights & Biases cannot start ({_one_line(error)}); training goes on without it")
        return None


def _pass_on(run: Any, lines: Iterable[bytes]) -> bool:
    """Until the lines end; whether the trainer said that it is over."""
    import wandb
    from PIL import Image

    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:  # the last line of a killed trainer
            return False
        if "end" in message:
            return True
        if "values" in message:
            run.log(message["values"], step=message["at"])
        elif "picture" in message:
            path = Path(message["picture"])
            with Image.open(path) as picture:
                run.log({message["tag"]: wandb.Image(picture)}, step=message["at"])
            path.unlink()
        elif not run.offline:
            run.alert(title="DCGAN", text=message["event"])
    return False


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the trainer was killed, and nobody listens
        os.write(1, f"{line}\n".encode())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
