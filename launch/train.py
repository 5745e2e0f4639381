"""Train a DCGAN: `torchrun --nproc_per_node=8 launch/train.py --config configs/celeba64.yaml --data.dataroot PATH`."""

import sys
from pathlib import Path

# torchrun puts launch/ on the path, not the clone, and `kernels` is also a package of another vendor.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.interpreter import require_packages

require_packages()
from pipeline.signals import heed_as_first_process  # noqa: E402

heed_as_first_process()

from pipeline.cli.train import main  # noqa: E402 - it takes a second, in which a signal may come
from pipeline.distributed import program  # noqa: E402

if __name__ == "__main__":
    program(main)
