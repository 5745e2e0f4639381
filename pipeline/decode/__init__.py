"""From a compressed file to a window of pixels: what the two decoders share.

The window is image_size plus crop_margin.  Both decoders resize to the size that geometry.place names and cut where it
says, so that they agree to a fraction of a gray level and either may stand in for the other.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError, DataConfig

Decoder = Literal["dali", "pillow"]
Pixels = NDArray[np.uint8]
"""Bytes: a file as (length,), an image as (H, W, C), images as (N, H, W, C)."""


def window_shape(cfg: DataConfig) -> tuple[int, int, int]:
    """(H, W, C) of a decoded window: the image and, on both axes, the margin its random crop moves in."""
    height, width = cfg.size
    return height + cfg.crop_margin, width + cfg.crop_margin, cfg.nc


def middle(windows: Any, cfg: DataConfig) -> Any:
    """(N, H, W, C) of windows (N, H + m, W + m, C), arrays or tensors: the middle of the places that a random crop may
    take.  A view."""
    (height, width), edge = cfg.size, cfg.crop_margin // 2
    return windows[:, edge : edge + height, edge : edge + width]


@cache
def dali_problem() -> str:
    """Why DALI cannot be used here, in a few words; empty: it can."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:  # absent, or a shared library that it needs is
        return str(error).splitlines()[0]
    return ""


def choose_decoder(cfg: DataConfig) -> tuple[Decoder, str]:
    """The decoder that data.decoder means here, and why.

    Raises:
        ConfigError: DALI is asked for by name and cannot be imported.
    """
    if cfg.decoder == "pillow":
        return "pillow", "data.decoder is pillow"
    problem = dali_problem()
    if not problem:
        return "dali", f"data.decoder is {cfg.decoder} and DALI is installed"
    if cfg.decoder == "dali":
        raise ConfigError(f"data.decoder must be auto or pillow where DALI cannot be imported ({problem}), got 'dali'")
    return "pillow", f"data.decoder is auto and DALI cannot be imported ({problem})"
