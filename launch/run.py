"""torchrun with the run's exit code: `python launch/run.py --standalone --nproc_per_node=8 launch/train.py ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.signals import heed_as_first_process  # noqa: E402

heed_as_first_process()

from pipeline.cli.run import main  # noqa: E402 - it takes a second, in which a signal may come

if __name__ == "__main__":
    sys.exit(main())
