"""`launch/doctor.py`: can this machine train, and if not, what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from pipeline.cli.command import Parser, run
from pipeline.config import ConfigError
from pipeline.doctor import TROUBLE, Check, failed, first_line, folders, hardware, network, ok, several, software
from pipeline.doctor.ranks import Findings, Meeting, Place, examine, join, not_joined

NAME = "doctor.py"
TRAINING_S = 10.0
WAIT_S = 60.0
_COLUMN = 29
"""Where what was found begins: state and name come before."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, and print what is found; the exit code is 0 where training can work, 1 where a check failed."""
    sound = True

    def body() -> None:
        nonlocal sound
        place = Place.from_environment()
        try:
            options = _read(arguments)
        except ConfigError:
            if place.rank == 0:
                raise
            sys.exit(ConfigError.exit_code)  # every rank has the same options, and one tells
        sound = _Examination(options, place).made()

    with _ended_by_sigterm():
        return run(NAME, body) or int(not sound)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, so that temporary folders and the training's process go with this one."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 3600, got {text!r}")
    return value


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(NAME, "Can this machine train, and if not, what is wrong? Under torchrun: can these ranks?")
    add = parser.add_argument
    add("--run.dir", dest="run_dir", metavar="PATH", default="", help="the run folder to be [runs]")
    add("--data.dataroot", dest="dataroot", metavar="PATH", default="", help="the photographs [none are looked at]")
    add("--data.cache_dir", dest="cache_dir", metavar="PATH", default="", help="as the trainer's [its default]")
    add("--json", action="store_true", help="one JSON object in place of the table")
    add("--skip-training", action="store_true", help="only look; without it a short training is tried")
    add("--training-s", metavar="S", type=_seconds, default=TRAINING_S, help="seconds of that training [10]")
    add("--wait-s", metavar="S", type=_seconds, default=WAIT_S, help="seconds that ranks wait for each other [60]")
    return parser.parse_args(arguments)


class _Page:
    """What was found: printed as it comes, or as JSON at the end.  Silent where this rank does not tell."""

    def __init__(self, *, as_json: bool, leads: bool) -> None:
        self.as_json, self.leads = as_json, leads
        self.checks: list[tuple[str, Check]] = []
        """Each with its group."""
        self.not_tried = ""
        self.width = min(160, max(80, shutil.get_terminal_size((120, 24)).columns))

    def begin(self, group: str) -> None:
        self._say(group)

    def add(self, group: str, checks: Sequence[Check], *, shown: Sequence[Check] | None = None) -> None:
        """
        Args:
            shown: what the table shows in place of the checks.
        """
        self.checks += [(group, check) for check in checks]
        for check in checks if shown is None else shown:
            start = f"  {check.state:<9}{check.name:<18}"
            self._wrapped(check.found, start)
            if check.advice:
                self._wrapped(f"-> {check.advice}", " " * _COLUMN)

    def _wrapped(self, text: str, start: str) -> None:
        options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
        self._say(textwrap.fill(text, self.width, initial_indent=start, subsequent_indent=" " * _COLUMN, **options))

    def _say(self, text: str) -> None:
        if self.leads and not self.as_json:
            print(text, flush=True)

    @property
    def sound(self) -> bool:
        return not any(check.state == "failed" for _, check in self.checks)

    def summary(self, who: str) -> str:
        """The last line."""
        states = Counter(check.state for _, check in self.checks)
        text = f"{len(self.checks)} checks: {states['ok']} ok, {several(states['warning'], 'warning')}, "
        text += f"{states['failed']} failed"
        bad = list(dict.fromkeys(check.name for _, check in self.checks if check.state == "failed"))
        verdict = f"{who} can train" if self.sound else f"{who} cannot train before this is mended: {', '.join(bad)}"
        return f"{text}; {verdict}{self.not_tried}"

    def finish(self, who: str, findings: Findings, training: dict[str, Any]) -> None:
        self._say("")
        self._wrapped_plain(self.summary(who))
        if self.leads and self.as_json:
            told = {
                "ok": self.sound,
                "summary": self.summary(who),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "checks": [dataclasses.asdict(check) | {"group": group} for group, check in self.checks],
                "ranks": findings.table,
                "all_reduce": findings.all_reduce,
                "training": training,
            }
            print(json.dumps(told, indent=1), flush=True)

    def _wrapped_plain(self, text: str) -> None:
        self._say(textwrap.fill(text, self.width, break_on_hyphens=False, break_long_words=False))


class _Examination:
    """One rank's part in it: the first of each machine looks at the machine, rank 0 tells."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        self.options, self.place = options, place
        self.page = _Page(as_json=options.json, leads=place.rank == 0)

    def made(self) -> bool:
        """Whether no check failed, as far as this rank is to tell."""
        options, place, page = self.options, self.place, self.page
        local = self._machine() if place.leads_node else []
        bad = {check.name for group, check in page.checks if group == "software" and check.state == "failed"}
        findings, meeting = Findings(), None
        if place.world_size > 1 and "torch" not in bad:
            page.begin("ranks")
            meeting, findings = self._ranks(local, usable=not bad)
        able = findings.well if place.world_size > 1 else not bad
        training: dict[str, Any] = {}
        if able and not options.skip_training:
            page.begin(f"training for {options.training_s:g} s")
            training = self._training(meeting)
        else:
            page.not_tried = "; a training was not tried"
        if place.rank == 0:
            who = "this machine" if place.world_size == 1 else f"these {place.world_size} ranks"
            page.finish(who, findings, training)
        return meeting.part(page.sound) if meeting else page.sound

    def _machine(self) -> list[Check]:
        options, place = self.options, self.place
        looks = {
            "software": lambda: software.checks(),
            "hardware": lambda: hardware.checks(place.local_world_size),
            "folders": lambda: folders.checks(options.run_dir, options.dataroot, options.cache_dir, place.world_size),
            "network": lambda: network.checks(
                under_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
                num_machines=-(-place.world_size // place.local_world_size),
            ),
        }
        found: list[Check] = []
        for group, look_at in looks.items():
            self.page.begin(group)
            checks = look_at()
            self.page.add(group, checks)
            found += checks
        return found

    def _ranks(self, local: list[Check], *, usable: bool) -> tuple[Meeting | None, Findings]:
        place, page = self.place, self.page
        try:
            meeting = join(place, self.options.wait_s)
        except TROUBLE as error:
            self._alone(not_joined(place, error))
            return None, Findings()
        try:
            findings = examine(meeting, local, self.options.run_dir, usable=usable)
        except TROUBLE as error:
            self._alone(failed("ranks", f"rank {place.rank}: {first_line(error)}", "look at the other ranks' output"))
            return None, Findings()
        page.add("ranks", findings.checks)
        for machine, checks in findings.others.items():
            good = [check for check in checks if check.state == "ok"]
            page.begin(machine)
            bad = [check for check in checks if check.state != "ok"]
            page.add(machine, checks, shown=[*bad, ok("the rest", several(len(good), "check"))])
        return meeting, findings

    def _alone(self, check: Check) -> None:
        """What this rank must tell itself, since it reaches no other."""
        self.page.add("ranks", [check])
        if self.place.rank:
            print(f"{NAME}: error: {check.found}; {check.advice}", file=sys.stderr, flush=True)

    def _training(self, meeting: Meeting | None) -> dict[str, Any]:
        from pipeline.doctor.training import train_alone, train_together

        seconds = self.options.training_s
        try:
            if meeting is None:
                checks, figures = train_alone(seconds, self.place)
            else:
                checks, figures = train_together(seconds, meeting)
        except TROUBLE as error:
            checks, figures = [failed("training", first_line(error), "mend what it names, then look again")], {}
        self.page.add("training", checks)
        return figures
