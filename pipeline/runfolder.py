"""The folder of a run: config.yaml, env.json, status.json, failures.jsonl and where the rest lies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.environment import describe
from pipeline.errors import StorageError
from pipeline.files import read_object, read_objects, write_in_place_if_full, written_aside

_OF_A_RUN = (
    "config.yaml",
    "choices.json",
    "env.json",
    "status.json",
    "stats.jsonl",
    "metrics.jsonl",
    "evaluations.jsonl",
    "failures.jsonl",
    "replaced.txt",
    "report.html",
    "report",
    "samples",
    "exports",
    "checkpoints",
    "tensorboard",
    "wandb",
)


ALL_SEEN = "all images seen"
"""Why a run has ended that nothing ended early."""
_MAX_EVENTS = 50
"""status.json keeps the newest so many."""


@dataclass(frozen=True)
class Outcome:
    """How a run that has come to a good end has ended."""

    images_seen: int
    checkpoint: Path | None
    """The last one."""
    elapsed_s: float
    """Seconds of training, those of earlier starts included."""
    reason: str = ALL_SEEN
    """Why there."""


class RunFolder:
    """A run's files; made by rank 0, who alone writes most of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ready = False
        """Whether it exists and can be written."""
        self.launch = ""
        """Names this start of the run, the same on every rank: whose failure a line in failures.jsonl is."""

    def prepare(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            ConfigError: run.dir is a file.
            StorageError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir must be a folder, got the file {self.path}")
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            raise StorageError(f"cannot write the run folder {self.path}: {error.strerror}") from None
        self.ready = True

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says; empty where there is none, or one that a crash cut short."""
        return read_object(self.path / "status.json")

    def move_aside(self) -> Path | None:
        """Put what an earlier run left here into replaced-NNN/, and return that folder; None where there is nothing."""
        found = [self.path / name for name in _OF_A_RUN if (self.path / name).exists()]
        if not any(path.name == "stats.jsonl" or path.name == "checkpoints" for path in found):
            return None
        number = 1
        while (aside := self.path / f"replaced-{number:03d}").exists():
            number += 1
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        return aside

    def describe(self, config_yaml: str) -> None:
        """Write the resolved settings and what they run on."""
        with written_aside(self.path / "config.yaml") as aside:
            aside.write_text(config_yaml)
        with written_aside(self.path / "env.json") as aside:
            aside.write_text(json.dumps(describe(), indent=1) + "\n")

    def update(self, **values: Any) -> None:
        """Change entries of status.json."""
        write_in_place_if_full(self.path / "status.json", json.dumps(self.status | values, indent=1) + "\n")

    def finish(self, outcome: Outcome) -> None:
        """Say in status.json that nothing is left to do."""
        last = str(outcome.checkpoint)
        self.update(
            state="finished", reason=outcome.reason, exit_code=0, images_seen=outcome.images_seen, checkpoint=last
        )

    def add_event(self, text: str, images_seen: int) -> None:
        """Keep in status.json what a person should know."""
        event = {"images_seen": images_seen, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "text": text}
        self.update(events=[*self.status.get("events", []), event][-_MAX_EVENTS:])

    def add_replaced(self, found: list[tuple[str, str]]) -> None:
        """Name bad files that training replaced."""
        try:
            with (self.path / "replaced.txt").open("a", errors="backslashreplace") as file:
                file.writelines(f"{key}\t{reason}\n" for key, reason in found)
        except OSError as error:
            raise StorageError(f"cannot write {self.path / 'replaced.txt'}: {error.strerror}") from None

    def add_failure(self, rank: int, error: BaseException, exit_code: int, *, lost_peer: bool) -> None:
        """Append what ended this rank to failures.jsonl; any rank may, since a short line is appended whole."""
        line = {
            "launch": self.launch,
            "rank": rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "lost_peer": lost_peer,
            "exit_code": exit_code,
            "error": f"{type(error).__name__}: {error}"[:1000],
            "traceback": "".join(traceback.format_exception(error))[-4000:],
        }
        text = json.dumps(line).encode() + b"\n"
        with (self.path / "failures.jsonl").open("ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = b"\n" + text  # a full disk or a crash has cut the line before short
            if (file.write(text) or 0) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def root_cause(self, patience_s: float) -> tuple[str, int]:
        """The first failure of this start that was not another rank's loss, else the first of all; and its exit code.

        Args:
            patience_s: how long to wait for a rank that says more than that it lost another.
        """
        deadline = time.monotonic() + patience_s
        while True:
            found = sorted(self._failures(), key=lambda line: (line["lost_peer"], line["time"]))
            if not found[0]["lost_peer"] or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        first = found[0]
        lost = "lost another rank, killed or out of reach: " if first["lost_peer"] else ""
        return f"{lost}rank {first['rank']} on {first['host']}: {first['error']}", first["exit_code"]

    def _failures(self) -> list[dict[str, Any]]:
        found = read_objects(self.path / "failures.jsonl")
        return [failure for failure in found if failure["launch"] == self.launch]

    def grid(self, images_seen: int) -> Path:
        """Where the grid of the fixed latents after so many images lies."""
        return self.path / "samples" / f"fakes-{images_seen:09d}.png"
