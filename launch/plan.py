"""What a run will need and how long it takes: `python launch/plan.py --config configs/celeba64.yaml --gpus 1,8`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
