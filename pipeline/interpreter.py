"""Whether this Python has what the commands need.  Nothing but the standard library, so that any Python can say so."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "torchvision", "yaml", "jsonargparse", "docstring_parser", "numpy", "PIL", "tqdm")
"""Modules without which no command goes far; setup.py lists the packages."""


def require_packages(*modules: str) -> None:
    """End the program with one line and exit code 2 where Python is too old or one of the modules is not installed.

    The usual reason: the environment of the clone is not active, or was never made.  Nothing is imported.

    Args:
        modules: by default NEEDED.
    """
    missing = [name for name in modules or NEEDED if importlib.util.find_spec(name) is None]
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything that an older one does not understand
        found = "Python 3.11 or newer is needed, " + sys.executable + " is " + sys.version.split()[0]
    elif missing:
        found = f"{sys.executable} has no {missing[0]}"
    else:
        return
    if (ROOT / ".venv/bin/activate").exists():
        advice = f"the clone's own environment has: source {ROOT}/.venv/bin/activate"
    else:
        advice = "make train makes an environment that has all: then source .venv/bin/activate"
    print(f"{Path(sys.argv[0]).name}: error: {found}; {advice}", file=sys.stderr)
    sys.exit(2)
