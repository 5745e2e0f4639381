"""A run as one HTML page: `python launch/report.py RUN`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.report import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
