"""`launch/sample.py`: pictures from a run's generator, as a grid, as single files, or as a walk between latents; the
nearest it comes to photographs; and arithmetic on latents."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline import latent_tools
from pipeline.checkpoint import chosen, open_generator
from pipeline.cli.command import Parser, at_least, device_of, run
from pipeline.config import ConfigError
from pipeline.files import folder_written_aside
from pipeline.latent_tools import Term
from pipeline.philox import Stream
from pipeline.pictures import grid, grid_shape, save_gif, save_png, to_image
from pipeline.projection import CANDIDATES, STEPS, project, read_photograph, save_latents
from pipeline.sampling import generate, latents, recalibrated, slerp

NAME = "sample.py"
LARGEST_GRID = 4096
"""Pictures; beyond it a grid is too large to look at, and single files serve better."""
LARGEST_PROJECTION = 64
"""Photographs at once: their time is bounded, and a page still shows them all."""
BATCH = 64
Drawn = Callable[[int, int], torch.Tensor]
"""drawn(start, count): the latents of the pictures start .. start + count - 1, (count, nz) on the device."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run(NAME, lambda: sample(_read(arguments)))


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(NAME, "Pictures from a run's generator. The same seed and weights give the same pictures.")
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", type=Path, help="folder of the run")
    add(
        "--checkpoint", metavar="best|last|PATH", help="which of the RUN's, or a checkpoint's folder without RUN [last]"
    )
    add("--out", metavar="PATH", type=Path, help="file or, with --single, folder [grid.png, walk.gif, ...]")
    add("--num", metavar="N", type=at_least(1), help="pictures [64]")
    add("--seed", metavar="S", type=at_least(0), default=0, help="of the latents [0]")
    add("--single", action="store_true", help="files 000000.png, 000001.png, ... in the folder --out")
    add("--interpolate", metavar="N", type=at_least(1), help="a GIF of N walks, each between two latents and back")
    add("--frames", metavar="N", type=at_least(2), help="frames of the GIF [48]")
    add("--ms", metavar="MS", type=at_least(20), help="milliseconds a frame of the GIF is shown [60]")
    add("--truncation", metavar="T", type=_above_0, help="latent values within +-T: less varied [no limit]")
    add("--project", metavar="PHOTO", nargs="+", type=Path, help="the pictures nearest to these photographs")
    add("--steps", metavar="N", type=at_least(1), help=f"of the search for them [{STEPS}]")
    add("--arithmetic", metavar="SUM", help="such as '0,3,5 - 1,2,7 + 4,6,9': means of pictures by number, added up")
    add("--weights", choices=("ema", "live"), default="ema", help="the averaged generator or the trained one [ema]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, else cpu]")
    return parser.parse_args(arguments)


def sample(options: argparse.Namespace) -> None:
    """Makes what the options ask for and prints where it is.

    Raises:
        ConfigError: options that contradict each other.
        UserError: no such run, a checkpoint that does not match its manifest, a disk that refuses.
    """
    terms = _checked(options)
    out: Path = options.out
    device = device_of(options.device)
    loaded, cfg, images_seen = open_generator(_source(options), weights=options.weights)
    photographs = [torch.from_numpy(read_photograph(path, cfg.data)) for path in options.project or []]
    generator = recalibrated(loaded.to(device), cfg.model.nz)

    def drawn(start: int, count: int) -> torch.Tensor:
        found = latents(options.seed, Stream.SAMPLE_LATENT, start, count, cfg.model.nz, device)
        return latent_tools.truncated(found, options.truncation) if options.truncation else found

    if options.interpolate:
        ends = drawn(0, 2 * options.interpolate)
        _save_walk(generator, ends[0::2], ends[1::2], out, frames=options.frames or 48, ms=options.ms or 60)
    elif options.single:
        _save_single(generator, drawn, options.num, out)
    elif photographs:
        _save_projection(generator, drawn, torch.stack(photographs), options)
    elif terms:
        _save_arithmetic(generator, drawn, terms, options.seed, out)
    else:
        save_png(grid(generate(generator, drawn(0, options.num), BATCH)), out)
    print(f"{out}  ({options.weights} weights after {images_seen:,} images)")


def _source(options: argparse.Namespace) -> Path:
    """The checkpoint's folder, or that of the run whose newest good one is meant."""
    if options.run is None:
        return Path(options.checkpoint)
    if options.checkpoint is None:
        found: Path = options.run
        return found
    return chosen(options.run, options.checkpoint).folder


def _checked(options: argparse.Namespace) -> list[Term]:
    """Fills in what was left open, refuses what contradicts itself, and returns the terms of --arithmetic."""
    if options.run is None and options.checkpoint in (None, "best", "last"):
        raise ConfigError("give RUN, or --checkpoint with the folder of a checkpoint")
    modes = {
        "--single": ("", "samples"),
        "--interpolate": (".gif", "walk.gif"),
        "--project": (".png", "projection.png"),
        "--arithmetic": (".png", "arithmetic.png"),
    }
    taken = [flag for flag in modes if getattr(options, flag[2:])]
    if len(taken) > 1:
        raise ConfigError(f"{taken[0]} does not go with {taken[1]}")
    mode = taken[0] if taken else ""
    goes_with = {
        "--num": ("", "--single"),
        "--frames": ("--interpolate",),
        "--ms": ("--interpolate",),
        "--steps": ("--project",),
        "--truncation": ("", "--single", "--interpolate", "--arithmetic"),
    }
    for flag, allowed in goes_with.items():
        if getattr(options, flag[2:]) is not None and mode not in allowed:
            only = len(allowed) == 1
            raise ConfigError(f"{flag} goes with {allowed[0]} only" if only else f"{flag} does not go with {mode}")
    options.num = options.num or 64
    suffix, name = modes.get(mode, (".png", "grid.png"))
    options.out = options.out or Path(name)
    if mode in ("", "--interpolate") and (in_grid := options.interpolate or options.num) > LARGEST_GRID:
        hint = "" if options.interpolate else "; --single writes more"
        raise ConfigError(f"a grid must be of at most {LARGEST_GRID} pictures, got {in_grid}{hint}")
    if options.project and len(options.project) > LARGEST_PROJECTION:
        raise ConfigError(f"--project must name at most {LARGEST_PROJECTION} photographs, got {len(options.project)}")
    if suffix and options.out.suffix.lower() != suffix:
        raise ConfigError(f"--out must end in {suffix}, got {options.out}")
    if suffix and options.out.is_dir():
        raise ConfigError(f"--out must be a file, {options.out} is a folder (--single fills a folder)")
    if not suffix and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out must be a new or empty folder with --single, got {options.out}")
    return latent_tools.parse_sum(options.arithmetic) if options.arithmetic is not None else []


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _save_walk(generator: nn.Module, a: torch.Tensor, b: torch.Tensor, out: Path, *, frames: int, ms: int) -> None:
    """All walks side by side, from a to b and back, slower at both ends; the way back shows the frames again."""
    there = frames // 2 + 1
    shown = []
    for i in range(there):
        t = 0.5 - 0.5 * math.cos(math.pi * i / (there - 1))
        shown.append(grid(generate(generator, slerp(a, b, t), BATCH)))
    save_gif([*shown, *shown[-2:0:-1]], out, ms)


def _save_projection(
    generator: nn.Module, drawn: Drawn, photographs: torch.Tensor, options: argparse.Namespace
) -> None:
    """Pairs of a photograph and its nearest picture, a line about each, and the latents in an .npz beside."""
    count = len(photographs)

    def after(done: int) -> None:
        print(f"{done} of {count} photographs", flush=True)

    candidates = drawn(0, CANDIDATES)
    found = project(generator, photographs, candidates, steps=options.steps or STEPS, batch=BATCH, after=after)
    lengths, usual = found.latents.norm(dim=1), math.sqrt(candidates.shape[1])
    for path, error, length in zip(options.project, found.errors.tolist(), lengths.tolist(), strict=True):
        print(f"{path}: off by {error:.1f} of 255 in the mean; its latent is {length:.1f} long, usual is {usual:.1f}")
    pairs = torch.stack([photographs, found.pictures], dim=1).flatten(0, 1)
    save_png(grid(pairs, columns=2 * max(1, grid_shape(count)[1] // 2)), options.out)
    beside = options.out.with_suffix(".npz")
    save_latents(beside, found, options.project)
    print(f"{beside}  (latents, errors, photographs)")


def _save_arithmetic(generator: nn.Module, drawn: Drawn, terms: list[Term], seed: int, out: Path) -> None:
    """The sum of the terms' means, with its operands and its neighbours, laid out as the paper's figure 7."""
    operands = [torch.cat([drawn(number, 1) for number in term.numbers]) for term in terms]
    means = torch.stack([each.mean(0) for each in operands])
    results = latent_tools.neighbours(latent_tools.total(terms, means), seed)
    pictures = generate(generator, torch.cat([*operands, means, results]), BATCH)
    *samples, below, right = pictures.split([*(len(each) for each in operands), len(means), len(results)])
    save_png(latent_tools.figure(terms, samples, below, right), out)


def _save_single(generator: nn.Module, drawn: Drawn, count: int, out: Path) -> None:
    """A folder of PNGs, filled under another name first, so that it is never seen half full."""
    with folder_written_aside(out) as aside:
        for start in range(0, count, BATCH):
            for i, pixels in enumerate(generate(generator, drawn(start, min(BATCH, count - start)), BATCH), start):
                to_image(pixels).save(aside / f"{i:06d}.png")
