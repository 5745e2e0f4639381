"""A run as one HTML page: `python launch/report.py RUN`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
