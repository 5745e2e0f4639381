"""The two pictures that a run shows while it trains: photographs as the networks see them, and what G draws."""

from __future__ import annotations

import torch
from PIL import Image

from pipeline.config import Config
from pipeline.feed import Feed
from pipeline.models import Generator
from pipeline.philox import Stream
from pipeline.pictures import grid
from pipeline.players import Players
from pipeline.sampling import generate, latents, recalibrated


def reals(feed: Feed) -> Image.Image:
    """A grid of the feed's first batch; closes the feed."""
    try:
        return grid(feed.next().cpu())
    finally:
        feed.close()


def fakes(players: Players, cfg: Config) -> Image.Image:
    """A grid of the fixed latents, by G's average with statistics recalibrated for it; G itself stays as it is."""
    generator = average_of(players, cfg)
    device = next(generator.parameters()).device
    fixed = latents(cfg.run.seed, Stream.FIXED_LATENT, 0, cfg.log.grid_size, cfg.model.nz, device)
    return grid(generate(recalibrated(generator, cfg.model.nz, images=512), fixed))


def average_of(players: Players, cfg: Config) -> Generator:
    """G's average, or G where none is kept, as a network of its own: float32, on the device, equal on all ranks but
    for its running statistics, which are this rank's (see pipeline.sampling.recalibrated)."""
    device = next(players.generator.parameters()).device
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, though for nothing
        generator = Generator(cfg.model.nz, cfg.model.ngf, cfg.data.nc, *cfg.data.size)
    generator.load_state_dict({k: v.float() for k, v in players.generator.state_dict().items()} | players.ema)
    generator.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return generator
