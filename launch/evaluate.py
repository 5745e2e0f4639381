"""How good a run's pictures are: `python launch/evaluate.py RUN --metrics swd,ms_ssim,fid`; torchrun shares it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.evaluate import main  # noqa: E402
from pipeline.distributed import program  # noqa: E402

if __name__ == "__main__":
    program(main)
