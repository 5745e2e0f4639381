"""A run as one HTML file that opens anywhere: what it learned, how fast, how well, with which settings.

report_run.py reads the run's folder, report_made.py makes pictures of its generator, report_page.py lays the page out
with report_metrics.py and report_shown.py, report_charts.py draws the curves, report_compare.py puts several runs on
one page; report.css and report.js become part of each.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.files import written_aside
from pipeline.report_made import refresh
from pipeline.report_page import page
from pipeline.report_run import check_run, read_run


def write_report(run: Path, *, dataroot: str = "", at_end: bool = True) -> Path:
    """Writes report.html in the run's folder, whole or not at all, and returns its path.

    The run may be going on, finished or failed; whatever there is so far is shown.

    Args:
        dataroot: where its photographs are, if not where its settings say.
        at_end: training waits for the page, so only what takes seconds is made anew.

    Raises:
        StorageError: no such run, a file of it that cannot be read, or a disk that refuses.
    """
    check_run(run)
    absent = refresh(run, dataroot=dataroot, at_end=at_end)
    path = run / "report.html"
    text = page(read_run(run), absent)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path
