"""`launch/report.py`: writes a run's report.html, or a page that compares several runs, and prints its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.command import Parser, run
from pipeline.config import ConfigError
from pipeline.report import write_report
from pipeline.report_compare import write_comparison

NAME = "report.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run(NAME, lambda: _report(arguments))


def _report(arguments: Sequence[str] | None) -> None:
    parser = Parser(
        NAME,
        "Writes report.html in a run's folder, or one page that compares several runs. The page opens anywhere, "
        "without a network.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not; several are compared")
    add("--out", metavar="FILE", type=Path, help="where the page of several runs goes [compare.html]")
    add("--data", metavar="PATH", help="where the run's photographs are, if not where its settings say")
    add("--quick", action="store_true", help="look through the photographs only where that takes seconds")
    options = parser.parse_args(arguments)
    if len(options.runs) == 1:
        if options.out:
            raise ConfigError("--out goes with several runs; the report of one is report.html in its folder")
        print(write_report(options.runs[0], dataroot=options.data or "", at_end=options.quick))
        return
    for flag, given in (("--data", options.data), ("--quick", options.quick)):
        if given:
            raise ConfigError(f"{flag} goes with one run")
    out = options.out or Path("compare.html")
    if out.suffix.lower() != ".html" or out.is_dir():
        raise ConfigError(f"--out must be a file that ends in .html, got {out}")
    print(write_comparison(options.runs, out))
