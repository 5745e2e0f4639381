"""Draws the recorded rows into docs/performance.png: `python -m benchmarks.plot`.

Left: trained images/s as a ratio to the plain tutorial loop of the same run, with its 95 % interval.  Right: images a
second of processor time from files to uint8 batches.  Each bar is the newest clean row of its variant; rates of
different runs are never put side by side, so a panel shows the rows of one run only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import command
from pipeline.environment import ROOT
from pipeline.errors import StorageError

RESULTS = ROOT / "benchmarks" / "results"
OUT = ROOT / "docs" / "performance.png"
TRAINED = {"tutorial": "plain tutorial loop", "trainer-fp32": "trainer, float32", "trainer": "trainer, as it chooses"}
FED = {
    "plain-pillow": "plain Pillow",
    "plain-dali": "plain DALI",
    "zip-pillow": "zip, Pillow",
    "tar-dali": "tar, DALI",
    "folder-dali": "folder, DALI",
    "zip-dali": "zip, DALI",
}
OURS, PEER = "#1f6f78", "#b8b8b8"


def newest_run(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the newest run in a results file that hold all of these variants, measured from a clean tree.

    Raises:
        StorageError: there is none.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: {error}") from None
    runs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if not row["dirty"]:
            runs.setdefault((row["commit"], row["command"]), {})[row["variant"]] = row
    for run in reversed(list(runs.values())):
        if set(names) <= run.keys():
            return [run[name] for name in names]
    raise StorageError(f"{path} holds no clean run of {', '.join(names)}")


def draw(train: list[dict[str, Any]], data: list[dict[str, Any]], out: Path) -> None:
    """Both panels into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), dpi=150, layout="constrained")
    ratios = [row["ratio_to_tutorial"] for row in train]
    reach = [[r - row["ratio_interval"][0], row["ratio_interval"][1] - r] for r, row in zip(ratios, train, strict=True)]
    colours = [PEER if row["variant"] == "tutorial" else OURS for row in train]
    names = [TRAINED[row["variant"]] for row in train]
    left.barh(names, ratios, color=colours, xerr=list(zip(*reach, strict=True)), capsize=3)
    left.set_xlim(0, 1.18 * max(ratios))
    for i, ratio in enumerate(ratios):
        left.text(ratio + 0.07 * max(ratios) ** 0.5, i, f"{ratio:.2f} x", va="center")
    settings = train[-1]
    left.set_title(f"Training, {settings['image_size']} x {settings['image_size']}, batch {settings['batch_size']}")
    left.set_xlabel("images/s, of the plain tutorial loop's")

    rates = [row["images_per_cpu_s"] for row in data]
    colours = [PEER if row["variant"].startswith("plain") else OURS for row in data]
    right.barh([FED[row["variant"]] for row in data], rates, color=colours)
    right.set_xlim(0, 1.18 * max(rates))
    for i, rate in enumerate(rates):
        right.text(rate + 30, i, f"{rate:,.0f}", va="center")
    right.set_title("Photographs to batches, one core")
    right.set_xlabel("images a second of processor time")
    figure.text(0, -0.04, f"{settings['hardware']['cpu']}, {settings['threads']} threads", size=8, color="#666")
    figure.savefig(out, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; the exit code is 0 or that of a user's error."""

    def body() -> None:
        parser = command.Parser("benchmarks.plot", __doc__.splitlines()[0] if __doc__ else "")
        parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
        parser.add_argument("--out", type=Path, default=OUT, help="the picture (default: %(default)s)")
        args: argparse.Namespace = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        draw(
            newest_run(args.results / "train.jsonl", list(TRAINED)),
            newest_run(args.results / "data.jsonl", list(FED)),
            args.out,
        )
        print(args.out)

    return command.run("benchmarks.plot", body)


if __name__ == "__main__":
    sys.exit(main())
