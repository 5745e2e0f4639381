"""Datasets made ready: `python launch/prepare.py faces|index|pack|torchvision ...`, each with --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.prepare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
