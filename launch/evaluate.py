"""How good a run's pictures are: `python launch/evaluate.py RUN --metrics swd,ms_ssim,fid`; torchrun shares it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
