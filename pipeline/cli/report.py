"""`launch/report.py`: writes a run's report.html and prints its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.command import Parser, run
from pipeline.report import write_report

NAME = "report.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run(NAME, lambda: _report(arguments))


def _report(arguments: Sequence[str] | None) -> None:
    parser = Parser(NAME, "Writes report.html in the run's folder: one file that opens anywhere, without a network.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, finished or not")
    print(write_report(parser.parse_args(arguments).run))
