"""torchrun with the run's exit code: `python launch/run.py --standalone --nproc_per_node=8 launch/train.py ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
