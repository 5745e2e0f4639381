"""Pictures from a trained generator: `python launch/sample.py RUN --num 64 --seed 0 --out grid.png`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.sample import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
