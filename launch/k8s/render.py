"""Kubernetes manifests from values: `python launch/k8s/render.py --values launch/k8s/values.yaml --kind trainjob`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from pipeline.interpreter import require_packages

require_packages("yaml", "jsonargparse", "docstring_parser")
from pipeline.cli.k8s import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
