"""Draws the recorded rows into docs/: `python -m benchmarks.plot`.

performance.png  left: trained images/s as a ratio to the plain tutorial loop of the same run, with its 95 % interval;
                 middle: that ratio at other sizes of batch and image; right: images a second of processor time from
                 files to uint8 batches.
kernels.png      what share of the bound, by this machine's rates of matrix product and copy, each operation reaches:
                 eager, compiled and as we have it.
scaling.png      left: efficiency of several ranks on one machine; right: the model of many GPUs.
Each shows the newest run from a clean tree: rates of different runs are never put side by side.  A bar of the middle
panel and a line of kernels.png stand for a run each, whose ratio and share are its own; all are of one machine.  A
picture without rows is left as it is, and that is said.  The left panel takes the newest of the training runs with the
most variants, so that one that was made for another size does not take its place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import RESULTS, say
from pipeline.cli import command
from pipeline.environment import ROOT
from pipeline.errors import StorageError
from pipeline.files import read_objects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = ROOT / "docs"
TRAINED = {
    "tutorial": "plain tutorial loop",
    "tutorial-compiled": "plain loop, compiled",
    "loader-2": "our step, DataLoader of 2",
    "loader-all": "our step, DataLoader of all cores",
    "peer": "another program",
    "trainer-fp32": "trainer, float32",
    "trainer": "trainer, as it chooses",
}
FED = {
    "plain-pillow": "plain Pillow",
    "plain-dali": "plain DALI",
    "zip-pillow": "zip, Pillow",
    "tar-dali": "tar, DALI",
    "folder-dali": "folder, DALI",
    "zip-dali": "zip, DALI",
}
PEERS = ("tutorial", "tutorial-compiled", "peer", "plain-pillow", "plain-dali")
OURS, PEER, COMPILED, FAINT = "#1f6f78", "#b8b8b8", "#d08b3e", "#666"

Rows = list[dict[str, Any]]


def clean_runs(path: Path) -> list[Rows]:
    """The rows of each run in a results file that was measured from a clean tree, the newest last."""
    runs: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for row in read_objects(path):
        if not row["dirty"]:
            # What a run has once more goes to the end, so that the last run is the newest.
            key = (row["commit"], row["command"])
            runs[key] = runs.pop(key, {}) | {(row["variant"], row.get("batch_size", 0)): row}
    return [list(run.values()) for run in runs.values()]


def newest_run(path: Path, needed: Sequence[str], *, fullest: bool = False) -> Rows:
    """The rows of the newest clean run that holds all of these variants.

    Args:
        fullest: of those with the most rows.

    Raises:
        StorageError: there is none.
    """
    runs = [run for run in clean_runs(path) if set(needed) <= {row["variant"] for row in run}]
    if runs:
        return max(reversed(runs), key=len) if fullest else runs[-1]
    raise StorageError(f"{path} holds no clean run of {', '.join(needed) or 'anything'}")


def runs_on(row: dict[str, Any]) -> str:
    """The machine, for the foot of a picture."""
    gpus = row["hardware"].get("gpus") or []
    if row.get("device") == "cuda" and gpus:
        return str(gpus[0])
    return f"{row['hardware']['cpu']}, {_threads(row)}"


def _threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}"


def save(figure: Figure, out: Path, foot: str) -> None:
    """Write it, with a line on what it was measured on."""
    from matplotlib import pyplot as plt

    figure.text(0, -0.04, foot, size=8, color=FAINT)
    figure.savefig(out, bbox_inches="tight")
    plt.close(figure)


def ratio_bars(axes: Axes, rows: Rows, names: Sequence[str], title: str) -> None:
    """Trained images/s of the tutorial's."""
    ratios = [row["ratio_to_tutorial"] for row in rows]
    reach = [[r - row["ratio_interval"][0], row["ratio_interval"][1] - r] for r, row in zip(ratios, rows, strict=True)]
    colours = [PEER if row["variant"] in PEERS else OURS for row in rows]
    axes.barh(names, ratios, color=colours, xerr=list(zip(*reach, strict=True)), capsize=3)
    axes.set_xlim(0, 1.22 * max(row["ratio_interval"][1] for row in rows))
    for i, row in enumerate(rows):
        axes.annotate(
            f"{ratios[i]:.2f} x", (row["ratio_interval"][1], i), (6, 0), textcoords="offset points", va="center"
        )
    axes.set_title(title)
    axes.set_xlabel("images/s, of the plain tutorial loop's")


def pixels(row: dict[str, Any]) -> str:
    return f"{row['image_size']} x {row['image_size']}"


def sizes_beside(path: Path, shown: dict[str, Any]) -> Rows:
    """The trainer's newest row of each size of batch and image, by size; of the size shown beside them, that one."""
    same = ("precision", "ngf", "data", "device", "threads", "hardware")
    found = {
        (row["image_size"], row["batch_size"]): row
        for run in clean_runs(path)
        for row in run
        if row["variant"] == "trainer" and row["ratio_to_tutorial"] and all(row[k] == shown[k] for k in same)
    }
    found[shown["image_size"], shown["batch_size"]] = shown
    return [found[key] for key in sorted(found)]


def rate_bars(axes: Axes, rows: Rows) -> None:
    """Images a second of processor time."""
    rates = [row["images_per_cpu_s"] for row in rows]
    colours = [PEER if row["variant"] in PEERS else OURS for row in rows]
    axes.barh([FED[row["variant"]] for row in rows], rates, color=colours)
    axes.set_xlim(0, 1.2 * max(rates))
    for i, rate in enumerate(rates):
        axes.annotate(f"{rate:,.0f}", (rate, i), (6, 0), textcoords="offset points", va="center")
    axes.set_title("Photographs to batches, one core")
    axes.set_xlabel("images a second of processor time")


def draw_performance(results: Path, out: Path) -> None:
    """Training and feed.

    Raises:
        StorageError: rows are missing.
    """
    from matplotlib import pyplot as plt

    path = results / "train.jsonl"
    found = {row["variant"]: row for row in newest_run(path, ["tutorial", "trainer"], fullest=True)}
    train = [found[name] for name in TRAINED if name in found]
    shown = found["trainer"]
    sizes = sizes_beside(path, shown)
    data = {row["variant"]: row for row in newest_run(results / "data.jsonl", list(FED))}
    height = 0.9 + 0.42 * max(len(train), len(FED), len(sizes))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15.5, height), dpi=150, layout="constrained")
    ratio_bars(left, train, [TRAINED[row["variant"]] for row in train], f"{pixels(shown)}, batch {shown['batch_size']}")
    names = [f"{pixels(row)}, batch {row['batch_size']}" for row in sizes]
    ratio_bars(middle, sizes, names, "Trainer, as it chooses, at other sizes")
    rate_bars(right, [data[name] for name in FED])
    save(figure, out, runs_on(shown))


def newest_operations(path: Path) -> Rows:
    """Each operation's rows of the newest clean run that has it, on the machine and at the sizes of the newest run.

    Raises:
        StorageError: there are no rows.
    """
    runs = clean_runs(path)
    newest = newest_run(path, [])[0]
    same = ("batch_size", "precision", "device", "threads", "hardware")
    found: dict[str, Rows] = {}
    for run in runs:
        mine = [row for row in run if all(row[key] == newest[key] for key in same)]
        for name in dict.fromkeys(row["operation"] for row in mine):
            found[name] = [row for row in mine if row["operation"] == name]
    return [row for rows in found.values() for row in rows]


def draw_kernels(results: Path, out: Path) -> None:
    """A line an operation, a dot a way, at the run's first batch size.

    Raises:
        StorageError: there are no rows.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows = newest_operations(results / "kernels.jsonl")
    names = list(dict.fromkeys(row["operation"] for row in rows))[::-1]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, panels = plt.subplots(
        1, len(passes), figsize=(10.5, 1.3 + 0.26 * len(names)), dpi=150, layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    styles = {"eager": ("o", PEER), "compile": ("s", COMPILED)}
    for axes, pass_name in zip(panels[0], passes, strict=True):
        for y, name in enumerate(names):
            mine = [row for row in rows if (row["operation"], row["pass"]) == (name, pass_name)]
            shares = [100 * row["fraction_of_bound"] for row in mine]
            if shares:
                axes.plot([min(shares), max(shares)], [y, y], color="#ddd", zorder=1)
            for row, share in zip(mine, shares, strict=True):
                marker, colour = styles.get(row["way"], ("D", OURS))
                axes.scatter(share, y, marker=marker, color=colour, s=32, zorder=2)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(0, max(100.0, 105 * max(row["fraction_of_bound"] for row in rows)))
        axes.axvline(100, color="#999", linewidth=0.8, linestyle=":")
        axes.grid(axis="x", color="#eee")
        axes.set_axisbelow(True)
        axes.set_title("forward" if pass_name == "forward" else "forward and backward")
        axes.set_xlabel("% of the bound by arithmetic or memory")
    handles = [
        Line2D([], [], linestyle="", marker=m, color=c, label=label)
        for (m, c), label in zip([*styles.values(), ("D", OURS)], ["eager", "torch.compile", "ours"], strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    first = rows[0]
    foot = f"{runs_on(first)}; batch {first['batch_size']}, {first['precision']}, {first['gemm_gflops_per_s']:,.0f} "
    save(figure, out, f"{foot}GFLOP/s in matrix products, {first['copy_gb_per_s']:,.1f} GB/s in copies")


def draw_ranks(axes: Axes, rows: Rows) -> None:
    """Efficiency of this machine's ranks."""
    one = next(row for row in rows if row["variant"] == "weak-1")
    for kind, colour, marker in (("weak", OURS, "o"), ("strong", COMPILED, "s")):
        mine = [one, *(row for row in rows if row["variant"].startswith(kind) and row["ranks"] > 1)]
        shares = [100 * row["efficiency"] for row in mine]
        reach = [
            [abs(100 * row["efficiency_interval"][i] - s) for row, s in zip(mine, shares, strict=True)] for i in (0, 1)
        ]
        axes.errorbar(
            [row["ranks"] for row in mine], shares, yerr=reach, color=colour, marker=marker, capsize=3,
            label=f"{kind}: batch {one['batch_size']} {'a rank' if kind == 'weak' else 'shared'}",
        )  # fmt: skip
    axes.set_xticks(sorted({row["ranks"] for row in rows}))
    axes.set_ylim(0, 110)
    axes.axhline(100, color="#999", linewidth=0.8, linestyle=":")
    machine = "one machine" if one.get("device") == "cuda" else f"{one['hardware']['cores']} cores"
    axes.set_title(f"Ranks on {machine}, {_threads(one)} each")
    axes.set_xlabel("ranks")
    axes.set_ylabel("% of that many times one rank")
    axes.legend(frameon=False, loc="lower left")


def draw_model(axes: Axes, rows: Rows) -> None:
    """Images a second of many GPUs, by the model."""
    for row in rows:
        weak = row["variant"] == "model-weak"
        gpus = [point["num_gpus"] for point in row["points"]]
        label = f"batch {row['batch_size']:,} a GPU" if weak else f"batch {row['batch_size']:,} shared"
        rates = [point["images_per_s"] for point in row["points"]]
        axes.plot(gpus, rates, color=OURS if weak else COMPILED, marker="o" if weak else "s", label=label)
        if weak:
            ideal = [rates[0] / gpus[0] * number for number in gpus]
            axes.plot(gpus, ideal, color="#999", linewidth=0.8, linestyle=":", label="no communication")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = rows[0]["points"]
    axes.set_xticks([p["num_gpus"] for p in ticks], [str(p["num_gpus"]) for p in ticks])
    axes.set_title(f"Model: {rows[0]['cluster']['within']['name']}, {rows[0]['cluster']['between']['name']}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s")
    axes.legend(frameon=False, loc="upper left")


def draw_scaling(results: Path, out: Path) -> None:
    """What there is of both panels.

    Raises:
        StorageError: there are rows of neither.
    """
    from matplotlib import pyplot as plt

    panels: list[tuple[Callable[[Axes, Rows], None], Rows]] = []
    feet = []
    path = results / "scaling.jsonl"
    measured = [row for row in _newest(path, "weak-1") if not row["variant"].startswith("model")]
    modelled = [row for row in _newest(path, "model-weak") if row["variant"].startswith("model")]
    if measured:
        panels.append((draw_ranks, measured))
        feet.append(runs_on(measured[0]))
    if modelled:
        panels.append((draw_model, modelled))
        feet.append(f"model from {modelled[0]['step_ms_from']}: an upper bound")
    if not panels:
        raise StorageError(f"{path} holds no clean run of weak-1 or model-weak")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.25 * len(panels), 3.6), dpi=150, layout="constrained", squeeze=False
    )
    for one, (draw, rows) in zip(axes[0], panels, strict=True):
        draw(one, rows)
    save(figure, out, "; ".join(feet))


def _newest(path: Path, name: str) -> Rows:
    """The newest run that has this variant; none where there is none."""
    try:
        return newest_run(path, [name])
    except StorageError:
        return []


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "performance.png": draw_performance,
    "kernels.png": draw_kernels,
    "scaling.png": draw_scaling,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; the exit code is 0 or that of a user's error."""

    def body() -> None:
        parser = command.Parser("benchmarks.plot", __doc__.splitlines()[0] if __doc__ else "")
        parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
        parser.add_argument("--folder", type=Path, default=FOLDER, help="of the pictures (default: %(default)s)")
        args: argparse.Namespace = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
        missing = []
        for name, draw in PICTURES.items():
            try:
                draw(args.results, args.folder / name)
            except StorageError as error:
                missing.append(error)
                say(f"{name} is left as it is: {error}")
            else:
                print(args.folder / name)
        if len(missing) == len(PICTURES):
            raise StorageError("there is nothing to draw")

    return command.run("benchmarks.plot", body)


if __name__ == "__main__":
    sys.exit(main())
