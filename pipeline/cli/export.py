"""`launch/export.py`: a run's generator as files that need nothing of this project."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pipeline import checkpoint as checkpoints
from pipeline.cli.command import Parser, run
from pipeline.config import ConfigError
from pipeline.export import FILES, Output, check_target, export, missing_packages
from pipeline.model_card import run_of

NAME = "export.py"
ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run(NAME, lambda: _export(_read(arguments)))


def _format(text: str) -> str:
    known = [*FILES, ALL]
    if text not in known:
        close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise argparse.ArgumentTypeError(f"must be {', '.join(known[:-1])} or {ALL}, got {text!r}{hint}")
    return text


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(NAME, "A run's generator, latents in and images out, as files that need nothing of this project.")
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of the run")
    add(
        "--format",
        dest="formats",
        metavar="FORMAT",
        type=_format,
        action="append",
        required=True,
        help="safetensors, torch (torch.export, .pt2), onnx, or all; may be given several times",
    )
    add(
        "--checkpoint",
        metavar="WHICH",
        help="best, last, or a checkpoint's folder [best where one is marked, else last]",
    )
    add("--weights", choices=("ema", "live"), default="ema", help="the averaged generator or the trained one [ema]")
    add(
        "--output",
        choices=get_args(Output),
        default="uint8",
        help="what .pt2 and .onnx give: (N, H, W, C) uint8, or (N, C, H, W) float32 in [-1, 1] [uint8]",
    )
    add("--out", metavar="FOLDER", type=Path, help="where the files go [RUN/exports/CHECKPOINT, with -live after it]")
    add("--overwrite", action="store_true", help="replace an older export in that folder")
    return parser.parse_args(arguments)


def _export(options: argparse.Namespace) -> None:
    formats = list(FILES) if ALL in options.formats else options.formats
    for kind in formats:
        missing = missing_packages(kind)
        if missing:
            raise ConfigError(
                f"--format {kind} needs the package {missing}, which is missing: pip install -e '.[export]'"
            )
    marked = (options.run / "checkpoints" / checkpoints.BEST).exists()
    checkpoint = checkpoints.chosen(options.run, options.checkpoint or ("best" if marked else "last"))
    name = checkpoint.folder.name + ("-live" if options.weights == "live" else "")
    out = options.out or (run_of(checkpoint) or Path()) / "exports" / name
    check_target(out, overwrite=options.overwrite)
    print(f"{checkpoint.folder}: {checkpoint.images_seen:,} images seen")
    export(checkpoint, out, formats, weights=options.weights, output=options.output)
    print(f"{out}: with config.json, README.md (a model card) and sample.png")
