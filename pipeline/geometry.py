"""Sizes and offsets as whole numbers, computed once and given to every decoder.

Left to themselves, two decoders round the resized side differently, and whole images shift by half a pixel.
The rule is torchvision's: Resize of the short side, then CenterCrop.
"""

from __future__ import annotations

from typing import NamedTuple


class Placement(NamedTuple):
    """Resize to (height, width), then cut a window at (top, left). Pixels."""

    height: int
    width: int
    top: int
    left: int


def place(height: int, width: int, window: tuple[int, int]) -> Placement:
    """How an image of height x width (after EXIF rotation) is resized to cover the window, and where it is cut.

    The side that fits tighter gets the window's length exactly, the other keeps the aspect ratio, rounded down; the
    window sits in the middle at round((side - window) / 2), ties to even as in Python and torchvision.
    """
    if window[0] * width >= window[1] * height:  # the height fits tighter: window_h / h >= window_w / w
        resized = window[0], max(window[1], window[0] * width // height)
    else:
        resized = max(window[0], window[1] * height // width), window[1]
    return Placement(*resized, round((resized[0] - window[0]) / 2), round((resized[1] - window[1]) / 2))
