"""A trained generator as safetensors, torch.export or ONNX: `python launch/export.py RUN --format all --out FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.interpreter import require_packages

require_packages()
from pipeline.cli.export import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
