"""`launch/sample.py`: pictures from a run's generator, as a grid, as single files, or as a walk between latents."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint import open_generator
from pipeline.cli.command import Parser, at_least, run
from pipeline.config import ConfigError
from pipeline.errors import StorageError
from pipeline.philox import Stream
from pipeline.pictures import grid, save_gif, save_png, to_image
from pipeline.sampling import generate, latents, recalibrated, slerp

NAME = "sample.py"
LARGEST_GRID = 4096
"""Pictures; beyond it a grid is too large to look at, and single files serve better."""
BATCH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run(NAME, lambda: sample(_read(arguments)))


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(NAME, "Pictures from a run's generator. The same seed and weights give the same pictures.")
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", type=Path, help="folder of the run; its newest good checkpoint is used")
    add("--checkpoint", metavar="PATH", type=Path, help="this checkpoint's folder instead of a RUN")
    add("--out", metavar="PATH", type=Path, help="file or, with --single, folder [grid.png, walk.gif, samples]")
    add("--num", metavar="N", type=at_least(1), help="pictures [64]")
    add("--seed", metavar="S", type=at_least(0), default=0, help="of the latents [0]")
    add("--single", action="store_true", help="files 000000.png, 000001.png, ... in the folder --out")
    add("--interpolate", metavar="N", type=at_least(1), help="a GIF of N walks, each between two latents and back")
    add("--frames", metavar="N", type=at_least(2), help="frames of the GIF [48]")
    add("--ms", metavar="MS", type=at_least(20), help="milliseconds a frame of the GIF is shown [60]")
    add("--weights", choices=("ema", "live"), default="ema", help="the averaged generator or the trained one [ema]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, else cpu]")
    return parser.parse_args(arguments)


def sample(options: argparse.Namespace) -> None:
    """Makes what the options ask for and prints where it is.

    Raises:
        ConfigError: options that contradict each other.
        UserError: no such run, a checkpoint that does not match its manifest, a disk that refuses.
    """
    source = _checked(options)
    out: Path = options.out
    device = _device(options.device)
    loaded, cfg, images_seen = open_generator(source, weights=options.weights)
    generator = recalibrated(loaded.to(device), cfg.model.nz)

    def drawn(start: int, count: int) -> torch.Tensor:
        return latents(options.seed, Stream.SAMPLE_LATENT, start, count, cfg.model.nz, device)

    if options.interpolate:
        ends = drawn(0, 2 * options.interpolate)
        _save_walk(generator, ends[0::2], ends[1::2], out, frames=options.frames or 48, ms=options.ms or 60)
    elif options.single:
        _save_single(generator, drawn, options.num, out)
    else:
        save_png(grid(generate(generator, drawn(0, options.num), BATCH)), out)
    print(f"{out}  ({options.weights} weights after {images_seen:,} images)")


def _checked(options: argparse.Namespace) -> Path:
    """Fills in what was left open, refuses what contradicts itself, and returns where the weights are."""
    if (options.run is None) == (options.checkpoint is None):
        raise ConfigError("give either RUN or --checkpoint PATH")
    if options.interpolate:
        for flag, given in (("--single", options.single), ("--num", options.num)):
            if given:
                raise ConfigError(f"{flag} does not go with --interpolate")
    else:
        for flag, given in (("--frames", options.frames), ("--ms", options.ms)):
            if given:
                raise ConfigError(f"{flag} goes with --interpolate only")
    options.num = options.num or 64
    suffix = ".gif" if options.interpolate else "" if options.single else ".png"
    options.out = options.out or Path({".gif": "walk.gif", ".png": "grid.png", "": "samples"}[suffix])
    in_grid = 0 if options.single else options.interpolate or options.num
    if in_grid > LARGEST_GRID:
        hint = "" if options.interpolate else "; --single writes more"
        raise ConfigError(f"a grid must be of at most {LARGEST_GRID} pictures, got {in_grid}{hint}")
    if suffix and options.out.suffix.lower() != suffix:
        raise ConfigError(f"--out must end in {suffix}, got {options.out}")
    if suffix and options.out.is_dir():
        raise ConfigError(f"--out must be a file, {options.out} is a folder (--single fills a folder)")
    if not suffix and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out must be a new or empty folder with --single, got {options.out}")
    return options.run or options.checkpoint


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on its build
        raise ConfigError(f"--device must be a device of this machine, got {name!r}") from error
    if device.type == "meta":
        raise ConfigError("--device must be a device of this machine, got 'meta'")
    return device


def _save_walk(generator: nn.Module, a: torch.Tensor, b: torch.Tensor, out: Path, *, frames: int, ms: int) -> None:
    """All walks side by side, from a to b and back, slower at both ends; the way back shows the frames again."""
    there = frames // 2 + 1
    shown = []
    for i in range(there):
        t = 0.5 - 0.5 * math.cos(math.pi * i / (there - 1))
        shown.append(grid(generate(generator, slerp(a, b, t), BATCH)))
    save_gif([*shown, *shown[-2:0:-1]], out, ms)


def _save_single(generator: nn.Module, drawn: Callable[[int, int], torch.Tensor], count: int, out: Path) -> None:
    """A folder of PNGs, filled under another name first, so that it is never seen half full."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        for start in range(0, count, BATCH):
            for i, pixels in enumerate(generate(generator, drawn(start, min(BATCH, count - start)), BATCH), start):
                to_image(pixels).save(aside / f"{i:06d}.png")
        os.replace(aside, out)  # noqa: PTH105 - an empty folder may be there
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(aside)
