"""Can this machine train, and if not, what is wrong: `python launch/doctor.py`, or the same under torchrun."""

import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - an older one stops here, not at the first word it does not know
    sys.exit("doctor.py: error: Python 3.11 or newer is needed, found " + sys.version.split()[0])
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
