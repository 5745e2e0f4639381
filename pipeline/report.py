"""A run as one HTML file that opens anywhere: what it learned, how fast, with which settings.

report_run.py reads the run's folder, report_page.py lays the page out, report_charts.py draws the curves; report.css
and report.js become part of the page.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.files import written_aside
from pipeline.report_page import page
from pipeline.report_run import read_run


def write_report(run: Path) -> Path:
    """Writes report.html in the run's folder, whole or not at all, and returns its path.

    The run may be going on, finished or failed; whatever there is so far is shown.

    Raises:
        StorageError: no such run, a file of it that cannot be read, or a disk that refuses.
    """
    path = run / "report.html"
    text = page(read_run(run))
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path
