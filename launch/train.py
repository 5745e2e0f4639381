"""Train a DCGAN: `torchrun --nproc_per_node=8 launch/train.py --config configs/celeba64.yaml --data.dataroot PATH`."""

import sys
from pathlib import Path

# torchrun puts launch/ on the path, not the clone, and `kernels` is also a package of another vendor.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
