"""Soft-edged shapes on a Pillow picture: smooth outlines, masks, and a brush that shades away from the light.

Shapes are (P, 2) float64 arrays of polygon corners, y down; masks are grayscale pictures, 255 where all of a pixel is
covered; colours are (red, green, blue), 0 to 255.  Pillow's polygons have hard edges, so a mask is drawn 3 times as
large and averaged, and only the box around it is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Shape = npt.NDArray[np.float64]
Points = Sequence[tuple[float, float]] | Shape


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """a for t = 0, b for t = 1."""
    return tuple(int(x + (y - x) * t + 0.5) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def distance(a: Colour, b: Colour) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


_T = np.linspace(0, 1, 8, endpoint=False)[:, None] ** np.arange(4)
_CATMULL_ROM = _T @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
"""(8, 4): eight places between two control points, as weights of the four control points around them."""


def curve(points: Points, closed: bool = False) -> Shape:
    """A smooth line through all the points, in order (Catmull-Rom)."""
    p = np.asarray(points, dtype=np.float64)
    padded = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    windows = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)])  # (4, segments, 2)
    line = np.einsum("tk,ksd->std", _CATMULL_ROM, windows).reshape(-1, 2)
    return line if closed else np.concatenate([line, p[-1:]])


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, bumps: float = 0) -> Shape:
    """Part of an ellipse, in degrees from the right over the bottom; `bumps` makes its edge a cloud's."""
    angle = np.radians(np.linspace(start, end, 72 if bumps else 32))
    radius = 1 + bumps * np.abs(np.sin(7 * angle)) if bumps else 1.0
    return np.stack([x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle)], axis=1)


def mirrored(half: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A symmetric outline from its right half; points on the middle line stay single."""
    return [*half, *((-x, y) for x, y in reversed(half) if x)]


def stroke(points: Points, thickness: float, taper: float = 0.5) -> Shape:
    """A smooth line as an area, `thickness` wide in its middle and `taper` times that at its ends."""
    line = curve(points)
    along = np.gradient(line, axis=0)
    normal = (
        np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]
    )
    t = np.linspace(-1, 1, len(line))[:, None]
    half = normal * (thickness / 2) * (1 - (1 - taper) * t**2)
    return np.concatenate([line + half, (line - half)[::-1]])


@functools.cache
def _soft_spot() -> Image.Image:
    """(64, 64) "L": 255 in the middle, falling smoothly to 0 at the rim of the inscribed circle."""
    axis = np.linspace(-1, 1, 64)
    falloff = np.clip(1 - np.hypot(axis, axis[:, None]), 0, 1)
    return Image.fromarray((255 * falloff**2 * (3 - 2 * falloff)).astype(np.uint8))


class Mask(NamedTuple):
    """Where to paint: coverage 0..255 over a box (left, top, right, bottom) of the picture."""

    coverage: Image.Image
    box: tuple[int, int, int, int]

    def within(self, clip: Mask) -> Mask:
        """The part of this mask that lies inside another."""
        left, top = clip.box[:2]
        a, b, c, d = self.box
        part = clip.coverage.crop((a - left, b - top, c - left, d - top))  # outside of an image a crop is 0
        return Mask(ImageChops.multiply(self.coverage, part), self.box)

    def faded(self, opacity: float) -> Mask:
        return Mask(self.coverage.point([int(i * opacity) for i in range(256)]), self.box)


class Brush:
    """Paints shapes, given in units around a centre, onto a picture.

    Args:
        picture: RGB, painted in place.
        shadow: "L", of the picture's size; 0 where the light arrives, 255 where none does.
        centre: (2,), pixels; where a shape's (0, 0) lies.
        scale: pixels a unit.
        tilt: radians, clockwise.
    """

    OVERSAMPLING = 3

    def __init__(
        self, picture: Image.Image, shadow: Image.Image, centre: Shape, scale: float, tilt: float = 0.0
    ) -> None:
        self.picture = picture
        self.shadow = shadow
        self.centre = centre
        self.matrix = scale * np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def moved(self, x: float, y: float) -> Brush:
        """This brush with its (0, 0) at the shape coordinates (x, y)."""
        other = copy(self)
        other.centre = np.array([x, y]) @ self.matrix + self.centre
        return other

    def mask(self, *shapes: Shape) -> Mask:
        """The union of the shapes, with smooth edges."""
        pixels = [shape @ self.matrix + self.centre for shape in shapes]
        low = np.minimum.reduce([p.min(axis=0) for p in pixels])
        high = np.maximum.reduce([p.max(axis=0) for p in pixels])
        width, height = self.picture.size
        left, top = max(int(low[0]) - 1, 0), max(int(low[1]) - 1, 0)
        right, bottom = max(min(int(high[0]) + 2, width), left + 1), max(min(int(high[1]) + 2, height), top + 1)
        k = self.OVERSAMPLING
        large = Image.new("L", ((right - left) * k, (bottom - top) * k))
        pen = ImageDraw.Draw(large)
        for p in pixels:
            pen.polygon(((p - (left, top)) * k).ravel().tolist(), fill=255)
        return Mask(large.reduce(k), (left, top, right, bottom))

    def spot(self, x: float, y: float, rx: float, ry: float) -> Mask:
        """A soft round glow."""
        cx, cy = np.array([x, y]) @ self.matrix + self.centre
        scale = np.hypot(*self.matrix[0])
        left, top = int(cx - rx * scale), int(cy - ry * scale)
        width, height = max(int(2 * rx * scale), 1), max(int(2 * ry * scale), 1)
        spot = _soft_spot().resize((width, height), Image.Resampling.BILINEAR)
        return Mask(spot, (left, top, left + width, top + height))

    def fill(self, mask: Mask, colour: Colour, dark: Colour | None = None) -> Mask:
        """Paints the mask in one colour, or, where `dark` is given, shaded towards that one away from the light."""
        self.picture.paste(colour, mask.box, mask.coverage)
        if dark is not None:
            self.picture.paste(dark, mask.box, ImageChops.multiply(mask.coverage, self.shadow.crop(mask.box)))
        return mask

    def paint(self, colour: Colour, *shapes: Shape, dark: Colour | None = None) -> Mask:
        """Fills the union of the shapes."""
        return self.fill(self.mask(*shapes), colour, dark)
