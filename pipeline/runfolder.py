"""The folder of a run: config.yaml, env.json, status.json and where the rest lies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.environment import describe
from pipeline.errors import StorageError
from pipeline.pictures import written_aside

_OF_A_RUN = (
    "config.yaml",
    "env.json",
    "status.json",
    "stats.jsonl",
    "report.html",
    "samples",
    "checkpoints",
    "tensorboard",
)


class RunFolder:
    """A run's files; made by rank 0, whose status it keeps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status: dict[str, Any] = {}
        self.ready = False
        """Whether it exists and can be written."""

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
        with contextlib.suppress(OSError, ValueError):  # absent, or cut short by a crash: it is written anew
            self.status = dict(json.loads((self.path / "status.json").read_text()))

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
        self.status = {}
        return aside

    def describe(self, config_yaml: str) -> None:
        """Write the resolved settings and what they run on."""
        with written_aside(self.path / "config.yaml") as aside:
            aside.write_text(config_yaml)
        with written_aside(self.path / "env.json") as aside:
            aside.write_text(json.dumps(describe(), indent=1) + "\n")

    def update(self, **values: Any) -> None:
        """Change entries of status.json."""
        self.status |= values
        with written_aside(self.path / "status.json") as aside:
            aside.write_text(json.dumps(self.status, indent=1) + "\n")

    def grid(self, images_seen: int) -> Path:
        """Where the grid of the fixed latents after so many images lies."""
        return self.path / "samples" / f"fakes-{images_seen:09d}.png"
