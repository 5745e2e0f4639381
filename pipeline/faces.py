"""Cartoon faces drawn from numbers: a set to learn from when there are no photographs.

Every face is a pure function of (seed, number): first its traits are sampled (`sample_face`), then it is painted layer
by layer (`paint_face`).  The drawings are made for a 64 x 64 GAN: centred heads, large eyes, soft edges, and skin, hair,
clothes and background whose colours are kept apart, so that what matters is a region and never a thin line.

Lengths are in units of half the picture's short side: the square that a centre crop keeps is [-1, 1] x [-1, 1], y down.
Shapes are (P, 2) float64 arrays of polygon corners; masks are Pillow "L" images; colours are (red, green, blue), 0..255.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from pipeline.config import ConfigError

DRAWING_VERSION = 1
"""Raised whenever the same (seed, number) would give another picture, so that an older set on disk is not reused."""

Colour = tuple[int, int, int]
Shape = np.ndarray

SKINS: Sequence[Colour] = (
    (255, 226, 202),
    (252, 210, 178),
    (242, 192, 152),
    (226, 170, 126),
    (204, 144, 102),
    (176, 116, 78),
    (146, 92, 62),
    (116, 74, 54),
)
"""From light to deep; a face's skin lies anywhere between two neighbours."""

HAIRS: dict[str, Colour] = {
    "black": (36, 32, 40),
    "espresso": (66, 42, 34),
    "chestnut": (112, 66, 40),
    "auburn": (148, 52, 34),
    "ginger": (214, 102, 38),
    "blonde": (236, 188, 92),
    "platinum": (246, 228, 178),
    "grey": (164, 166, 176),
}
BACKGROUNDS: Sequence[Colour] = (
    (120, 182, 228),
    (134, 208, 190),
    (196, 178, 232),
    (246, 168, 172),
    (252, 218, 128),
    (84, 124, 178),
    (70, 152, 148),
    (232, 236, 242),
    (132, 112, 168),
    (250, 186, 120),
)
CLOTHES: Sequence[Colour] = (
    (44, 62, 106),
    (196, 62, 62),
    (62, 130, 92),
    (226, 166, 52),
    (244, 244, 240),
    (118, 72, 140),
    (48, 148, 160),
    (60, 62, 72),
    (232, 122, 146),
)
IRISES: Sequence[Colour] = ((78, 48, 32), (56, 36, 28), (64, 112, 168), (70, 130, 84), (96, 110, 124))
RIMS: Sequence[Colour] = ((34, 34, 42), (34, 34, 42), (124, 46, 40), (40, 64, 120))
HAIR_STYLES = ("short", "side_part", "straight", "wavy", "bob", "afro", "bun", "fringe")
MOUTHS = ("smile", "open", "neutral")
COLLARS = ("crew", "v_neck", "shirt")
WHITE: Colour = (255, 255, 255)
INK: Colour = (38, 30, 36)


@dataclass(frozen=True, kw_only=True)
class Face:
    """The traits of one person in one pose: everything that `paint_face` needs to know."""

    skin: Colour
    hair: Colour
    hair_name: str
    hair_style: str
    iris: Colour
    background: Colour
    clothes: Colour
    collar: str
    mouth: str
    glasses: str
    """"none", "round" or "square"."""
    rim: Colour
    beard: str
    """"none", "beard" or "moustache"."""
    width: float
    """Half the head's width, in units."""
    height: float
    """Half the head's height, in units."""
    jaw: float
    """How much the head narrows to the chin; 0 is an ellipse."""
    eye: float
    """Half an eye's width, in units."""
    eye_gap: float
    """From the face's middle line to an eye's centre, in units."""
    brow: float
    """How far the brows' outer ends hang, in units; negative is raised."""
    lips: float
    """Half the mouth's width, in units."""
    side: int
    """-1 or 1: to which side the hair is parted."""
    wave: float
    """Phase of waves and curls, radians."""
    light: float
    """Where the light comes from: -1 from the left, 1 from the right."""
    tilt: float
    """Roll of the head, radians."""
    turn: float
    """-1 looks to the left edge, 1 to the right."""
    shift: tuple[float, float]
    """Where the head's centre lies, in units."""
    zoom: float
    """Size of everything; 1 fills about three quarters of the square."""


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """a for t = 0, b for t = 1."""
    return tuple(int(x + (y - x) * t + 0.5) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def distance(a: Colour, b: Colour) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def sample_face(seed: int, number: int) -> Face:
    """Traits of face `number`; only doubles in [0, 1) are drawn from numpy, whose other distributions change by version."""
    # The number sits above the word that Philox counts with, so that no two faces share random numbers.
    bits = np.random.Philox(key=seed % 2**64, counter=number << 64)
    draw = iter(np.random.Generator(bits).random(64).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(draw)

    def one_of[T](options: Sequence[T]) -> T:
        return options[int(next(draw) * len(options))]

    def apart(options: Sequence[Colour], *others: Colour) -> Colour:
        """One of the options that stands out from the others; if none does, the one that stands out most."""
        contrast = [min(distance(option, other) for other in others) for option in options]
        floor = min(72.0, max(contrast))
        return one_of([option for option, value in zip(options, contrast, strict=True) if value >= floor])

    tone = between(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    hair = apart(tuple(HAIRS.values()), skin)
    hair_name = next(name for name, colour in HAIRS.items() if colour == hair)
    hair = mix(hair, mix(INK, WHITE, between(0, 1)), 0.06)
    style = one_of(HAIR_STYLES)
    background = mix(apart(BACKGROUNDS, skin, hair), WHITE, between(0, 0.15))
    bearded = next(draw) < 0.34 and style in ("short", "side_part", "afro", "bun")
    beard = one_of(("beard", "beard", "moustache"))
    spectacles = next(draw) < 0.3
    frame = one_of(("round", "square"))
    return Face(
        skin=skin,
        hair=hair,
        hair_name=hair_name,
        hair_style=style,
        iris=one_of(IRISES[:2] if tone > 4 else IRISES),
        background=background,
        clothes=apart(CLOTHES, skin, background, hair),
        collar=one_of(COLLARS),
        mouth=one_of(MOUTHS),
        glasses=frame if spectacles else "none",
        rim=one_of(RIMS),
        beard=beard if bearded else "none",
        width=between(0.44, 0.5),
        height=between(0.56, 0.61),
        jaw=between(0.12, 0.26),
        eye=between(0.105, 0.125),
        eye_gap=between(0.19, 0.215),
        brow=between(-0.02, 0.035),
        lips=between(0.15, 0.2),
        side=one_of((-1, 1)),
        wave=between(0, 2 * np.pi),
        light=one_of((-1.0, 1.0)) * between(0.5, 1.0),
        tilt=np.radians(between(-6, 6)),
        turn=between(-1, 1),
        shift=(between(-0.06, 0.06), between(-0.02, 0.06)),
        zoom=between(0.94, 1.04),
    )


# --- shapes ------------------------------------------------------------------------------------------------------------

_T = np.linspace(0, 1, 8, endpoint=False)[:, None] ** np.arange(4)
_CATMULL_ROM = _T @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
"""(8, 4): eight places between two control points, as weights of the four control points around them."""


def curve(points: Sequence[tuple[float, float]] | Shape, closed: bool = False) -> Shape:
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
    """A symmetric outline from its right half, given from the top down."""
    return [*half, *((-x, y) for x, y in reversed(half))]


def stroke(points: Sequence[tuple[float, float]], thickness: float, taper: float = 0.5) -> Shape:
    """A smooth line as an area, `thickness` wide in its middle and `taper` times that at its ends."""
    line = curve(points)
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]
    t = np.linspace(-1, 1, len(line))[:, None]
    half = normal * (thickness / 2) * (1 - (1 - taper) * t**2)
    return np.concatenate([line + half, (line - half)[::-1]])


@functools.cache
def _soft_spot() -> Image.Image:
    """(64, 64) "L": 255 in the middle, falling smoothly to 0 at the rim of the inscribed circle."""
    axis = np.linspace(-1, 1, 64)
    falloff = np.clip(1 - np.hypot(axis, axis[:, None]), 0, 1)
    return Image.fromarray((255 * falloff**2 * (3 - 2 * falloff)).astype(np.uint8))


# --- painting ----------------------------------------------------------------------------------------------------------


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
    """Paints shapes, given in units of a frame (the body's or the head's), onto a picture."""

    OVERSAMPLING = 3

    def __init__(self, picture: Image.Image, shadow: Image.Image, centre: Shape, scale: float, tilt: float = 0.0) -> None:
        self.picture = picture
        self.shadow = shadow
        """ "L", of the picture's size: how little light arrives."""
        self.centre = centre
        self.matrix = scale * np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

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


def paint_face(face: Face, size: tuple[int, int]) -> Image.Image:
    """The picture of a face, RGB of size (width, height); the head lies in the central square."""
    width, height = size
    scale = min(width, height) / 2
    middle = np.array([width / 2, height / 2])
    picture = _background(face, size)
    shadow = _shadow(face, size)
    body = Brush(picture, shadow, middle + np.array(face.shift) * (scale * 0.6), scale * face.zoom)
    head = Brush(picture, shadow, middle + np.array(face.shift) * scale, scale * face.zoom, face.tilt)
    _paint_back_hair(head, face)
    _paint_body(body, face)
    skull = _paint_head(head, face)
    _paint_beard(head, face, skull)
    _paint_eyes(head, face)
    _paint_nose_and_mouth(head, face)
    _paint_front_hair(head, face, skull)
    _paint_brows(head, face)
    _paint_glasses(head, face)
    return picture


def _background(face: Face, size: tuple[int, int]) -> Image.Image:
    """A gradient: lighter towards the light, darker below."""
    x, y = np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8))
    light = np.clip(0.5 + 0.32 * face.light * x - 0.34 * y, 0, 1)[..., None]
    low, high = np.array(mix(face.background, INK, 0.16)), np.array(mix(face.background, WHITE, 0.3))
    return Image.fromarray((low + (high - low) * light).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _shadow(face: Face, size: tuple[int, int]) -> Image.Image:
    x, y = np.meshgrid(np.linspace(-1, 1, 16) * size[0] / min(size), np.linspace(-1, 1, 16) * size[1] / min(size))
    away = (0.25 - (x - face.shift[0]) * face.light * 1.25 + (y - face.shift[1]) * 0.25) / 0.9
    t = np.clip(away, 0, 1)
    return Image.fromarray((255 * t * t * (3 - 2 * t)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _skin_dark(face: Face) -> Colour:
    return mix(face.skin, (120, 40, 40), 0.34)


def _hair_tones(face: Face) -> tuple[Colour, Colour, Colour]:
    """Hair in the light, in the shade, and behind the head."""
    return mix(face.hair, WHITE, 0.06), mix(face.hair, (24, 12, 24), 0.34), mix(face.hair, (24, 12, 24), 0.28)


def _paint_body(brush: Brush, face: Face) -> None:
    """Shoulders in clothes, the neck, and what the collar shows of it."""
    dark = _skin_dark(face)
    cloth_dark = mix(face.clothes, (20, 16, 40), 0.32)
    shoulders = curve(mirrored([(0.0, 0.66), (0.26, 0.68), (0.62, 0.78), (0.86, 0.98), (0.94, 1.5)]), closed=True)
    brush.fill(brush.mask(shoulders), face.clothes, cloth_dark)
    neck = np.array(mirrored([(0.2, 0.3), (0.2, 0.66), (0.26, 0.72)]))
    if face.collar == "crew":
        brush.fill(brush.mask(arc(0, 0.7, 0.31, 0.2)), mix(face.clothes, WHITE if sum(face.clothes) < 480 else INK, 0.25))
        opening = arc(0, 0.69, 0.255, 0.15)
    elif face.collar == "v_neck":
        opening = np.array(mirrored([(0.27, 0.66), (0.0, 1.02)]))
    else:
        opening = np.array(mirrored([(0.23, 0.66), (0.0, 0.9)]))
    skin = brush.mask(neck, opening)
    brush.fill(skin, face.skin, dark)
    brush.fill(brush.mask(arc(0, 0.42, 0.42, 0.3)).within(skin).faded(0.75), mix(face.skin, dark, 0.9))
    if face.collar == "shirt":
        collar = mix(face.clothes, WHITE, 0.35) if sum(face.clothes) < 660 else mix(face.clothes, INK, 0.16)
        for s in (-1, 1):
            flap = np.array([(0.2 * s, 0.62), (0.32 * s, 0.7), (0.2 * s, 1.0), (0.0, 0.88)])
            brush.fill(brush.mask(flap), collar)


def _outline(face: Face, grow: float = 0.0) -> Shape:
    """The head's edge."""
    t = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    x, y = np.sin(t), -np.cos(t)
    narrow = 1 - face.jaw * np.clip(y, 0, 1) ** 2
    return np.stack([(face.width + grow) * x * narrow + 0.02 * face.turn * y, (face.height + grow) * y], axis=1)


def _paint_head(brush: Brush, face: Face) -> Mask:
    dark = _skin_dark(face)
    for s in (-1, 1):
        x = s * (face.width + 0.01) - 0.03 * face.turn
        brush.fill(brush.mask(arc(x, 0.06, 0.085, 0.13)), face.skin, dark)
        brush.fill(brush.mask(arc(x + 0.01 * s, 0.06, 0.045, 0.08)), mix(face.skin, dark, 0.6))
    skull = brush.fill(brush.mask(_outline(face)), face.skin, dark)
    glow = brush.spot(0.16 * face.light + 0.05 * face.turn, -0.12, 0.42, 0.46).within(skull)
    brush.fill(glow.faded(0.4), mix(face.skin, (255, 246, 226), 0.45))
    for s in (-1, 1):
        cheek = brush.spot(0.27 * s + 0.06 * face.turn, 0.2, 0.17, 0.13).within(skull)
        brush.fill(cheek.faded(0.55), mix(face.skin, (232, 70, 80), 0.45))
    return skull


def _paint_eyes(brush: Brush, face: Face) -> None:
    r = face.eye
    for s in (-1, 1):
        x, y = s * face.eye_gap + 0.06 * face.turn, -0.02
        brush.fill(brush.mask(arc(x, y - 0.018, r * 1.1, r * 0.98)), mix(face.hair, INK, 0.85))  # the upper lashes
        white = brush.fill(brush.mask(arc(x, y, r, r * 0.88)), (252, 252, 255))
        gaze = x + 0.018 * face.turn
        brush.fill(brush.mask(arc(gaze, y - 0.004, r * 0.68, r * 0.72)).within(white), face.iris)
        brush.fill(brush.mask(arc(gaze, y - 0.004, r * 0.38, r * 0.4)), (18, 14, 20))
        brush.fill(brush.mask(arc(gaze + 0.03 * face.light, y - 0.035, r * 0.24, r * 0.24)), WHITE)


def _paint_brows(brush: Brush, face: Face) -> None:
    colour = mix(face.hair, INK, 0.3 if sum(face.hair) > 300 else 0.0)
    for s in (-1, 1):
        x = 0.06 * face.turn
        points = [(s * 0.09 + x, -0.17), (s * 0.2 + x, -0.205), (s * 0.32 + x, -0.17 + face.brow)]
        brush.fill(brush.mask(stroke(points, 0.055)), colour)


def _paint_nose_and_mouth(brush: Brush, face: Face) -> None:
    dark = _skin_dark(face)
    x = 0.085 * face.turn
    brush.fill(brush.mask(arc(x, 0.155, 0.075, 0.055)).faded(0.75), mix(face.skin, dark, 0.85))
    brush.fill(brush.mask(arc(x, 0.13, 0.066, 0.055)), mix(face.skin, (255, 244, 224), 0.16))
    x, y, w = 0.06 * face.turn, 0.33, face.lips
    lip = mix(face.skin, (176, 28, 48), 0.62)
    if face.mouth == "open":
        shape = curve([(x - w, y - 0.045), (x, y - 0.015), (x + w, y - 0.045), (x + 0.62 * w, y + 0.08), (x, y + 0.115),
                       (x - 0.62 * w, y + 0.08)], closed=True)  # fmt: skip
        mouth = brush.fill(brush.mask(shape), (116, 26, 40))
        brush.fill(brush.mask(arc(x, y + 0.12, 0.6 * w, 0.06)).within(mouth), (222, 92, 100))
        brush.fill(brush.mask(arc(x, y - 0.04, 0.9 * w, 0.062)).within(mouth), WHITE)
    elif face.mouth == "smile":
        shape = [(x - w, y - 0.045), (x - 0.5 * w, y + 0.01), (x, y + 0.028), (x + 0.5 * w, y + 0.01), (x + w, y - 0.045)]
        brush.fill(brush.mask(stroke(shape, 0.062, 0.35)), lip)
    else:
        shape = [(x - 0.8 * w, y), (x - 0.3 * w, y - 0.012), (x, y - 0.004), (x + 0.3 * w, y - 0.012), (x + 0.8 * w, y)]
        brush.fill(brush.mask(stroke(shape, 0.066, 0.3)), lip)


def _paint_beard(brush: Brush, face: Face, skull: Mask) -> None:
    if face.beard == "none":
        return
    light, dark, _ = _hair_tones(face)
    x = 0.06 * face.turn
    moustache = curve([(x, 0.225), (x + 0.14, 0.235), (x + 0.23, 0.33), (x + 0.1, 0.29), (x, 0.28), (x - 0.1, 0.29),
                       (x - 0.23, 0.33), (x - 0.14, 0.235)], closed=True)  # fmt: skip
    shapes = [moustache]
    if face.beard == "beard":
        w = face.width
        inner = curve([(w, 0.08), (w - 0.09, 0.22), (x + 0.2, 0.25), (x, 0.225), (x - 0.2, 0.25), (0.09 - w, 0.22), (-w, 0.08)])
        lower = _outline(face, 0.02)
        shapes.append(np.concatenate([lower[(lower[:, 1] > 0.08)], inner[::-1]]))
    brush.fill(brush.mask(*shapes), light, dark)
    if face.beard == "beard":
        brush.fill(brush.mask(arc(x, 0.345, face.lips + 0.02, 0.075)), mix(face.skin, _skin_dark(face), 0.35))


def _paint_glasses(brush: Brush, face: Face) -> None:
    if face.glasses == "none":
        return
    x, y, rim = 0.06 * face.turn, -0.015, 0.042
    power = 1.0 if face.glasses == "round" else 0.5
    for s in (-1, 1):
        t = np.linspace(0, 2 * np.pi, 40)
        c, d = np.cos(t), np.sin(t)
        edge = np.stack([np.sign(c) * np.abs(c) ** power, np.sign(d) * np.abs(d) ** power], axis=1)
        place = np.array([s * (face.eye_gap + 0.005) + x, y])
        outer, inner = edge * (0.185, 0.175) + place, edge * (0.185 - rim, 0.175 - rim) + place
        brush.fill(brush.mask(inner).faded(0.13), WHITE)
        brush.fill(brush.mask(np.concatenate([outer, inner[::-1]])), face.rim)
        temple = [(s * (face.eye_gap + 0.17) + x, y - 0.05), (s * (face.width + 0.02), y - 0.03)]
        brush.fill(brush.mask(stroke(temple, rim, 1.0)), face.rim)
    brush.fill(brush.mask(stroke([(x - 0.06, y - 0.03), (x, y - 0.05), (x + 0.06, y - 0.03)], rim, 1.0)), face.rim)


def _paint_back_hair(brush: Brush, face: Face) -> None:
    """What of the hair lies behind the head and the shoulders."""
    w, h = face.width, face.height
    back = _hair_tones(face)[2]
    dark = mix(back, (24, 12, 24), 0.3)
    sway = 0.03 * np.sin(face.wave)
    if face.hair_style == "straight":
        half = [(0.0, -h - 0.1), (w * 0.7, -h * 0.78), (w + 0.12, -0.1), (w + 0.15, 0.5), (w + 0.17, 1.0), (0.2, 1.05)]
        shapes = [curve(mirrored(half), closed=True)]
    elif face.hair_style == "wavy":
        half = [(0.0, -h - 0.14), (w * 0.8, -h * 0.78), (w + 0.17, -0.22), (w + 0.12, 0.08), (w + 0.24, 0.36),
                (w + 0.17, 0.6), (w + 0.25, 0.84), (w, 0.98)]  # fmt: skip
        shapes = [curve(mirrored(half), closed=True)]
    elif face.hair_style == "bob":
        half = [(0.0, -h - 0.1), (w * 0.75, -h * 0.8), (w + 0.13, -0.1), (w + 0.18, 0.3), (w + 0.06, 0.5), (w - 0.2, 0.46)]
        shapes = [curve(mirrored(half), closed=True)]
    elif face.hair_style == "fringe":
        half = [(0.0, -h - 0.1), (w * 0.75, -h * 0.8), (w + 0.11, -0.1), (w + 0.14, 0.4), (w + 0.13, 0.68), (w - 0.2, 0.7)]
        shapes = [curve(mirrored(half), closed=True)]
    elif face.hair_style == "afro":
        shapes = [arc(0, -0.22, 0.66 + sway, 0.6 + sway, bumps=0.09)]
    elif face.hair_style == "bun":
        shapes = [arc(sway - 0.02 * face.turn, -h - 0.13, 0.21, 0.19)]
    else:
        return
    brush.fill(brush.mask(*shapes), back, dark)


def _paint_front_hair(brush: Brush, face: Face, skull: Mask) -> None:
    """The cap of hair over the forehead: an arc over the skull, closed by the hairline; with it its shadow and shine."""
    w, h, x, p = face.width, face.height, 0.04 * face.turn, face.side
    light, dark, _ = _hair_tones(face)
    locks: list[Shape] = []
    top = arc(0, -0.1, w + 0.05, h - 0.1 + 0.1, 180, 360)
    if face.hair_style == "short":
        line = [(w + 0.05, -0.1), (w + 0.02, 0.05), (w - 0.05, 0.0), (w - 0.08, -0.22), (0.2 + x, -0.34), (x, -0.36),
                (x - 0.2, -0.34), (0.08 - w, -0.22), (0.05 - w, 0.0), (-w - 0.02, 0.05), (-w - 0.05, -0.1)]  # fmt: skip
    elif face.hair_style == "side_part":
        top = curve([(-w - 0.05, -0.1), (-w - 0.03, -0.36), (-w * 0.62, -h * 0.95), (0.0, -h - 0.14), (w * 0.62, -h - 0.07),
                     (w + 0.06, -0.4), (w + 0.05, -0.1)])  # fmt: skip
        line = [(w + 0.05, -0.1), (w + 0.02, 0.04), (w - 0.04, -0.02), (w - 0.06, -0.24), (0.22 + x, -0.27), (x, -0.34),
                (x - 0.2, -0.47), (-0.24 + x, -0.42), (0.06 - w, -0.24), (0.04 - w, -0.02), (-w - 0.02, 0.04),
                (-w - 0.05, -0.1)]  # fmt: skip
    elif face.hair_style in ("straight", "wavy"):
        line = [(w + 0.05, -0.1), (w - 0.01, 0.06), (w - 0.07, -0.12), (0.2 + x, -0.36), (x, -0.5), (x - 0.2, -0.36),
                (0.07 - w, -0.12), (0.01 - w, 0.06), (-w - 0.05, -0.1)]  # fmt: skip
        bend = 0.05 if face.hair_style == "wavy" else 0.0
        for s in (-1, 1):
            outer = [(w + 0.05, -0.2), (w + 0.1 + bend, 0.1), (w + 0.1 - bend, 0.4), (w + 0.12 + bend, 0.7), (w + 0.06, 0.96)]
            inner = [(w - 0.12, 0.94), (w - 0.08 + bend, 0.7), (w - 0.03 - bend, 0.4), (w - 0.03, 0.1), (w - 0.09, -0.16)]
            locks.append(curve([(s * a, b) for a, b in outer + inner], closed=True))
    elif face.hair_style == "bob":
        line = [(w + 0.05, -0.1), (w - 0.02, 0.06), (w - 0.06, -0.14), (0.26 + x, -0.25), (0.06 + x, -0.3), (x - 0.18, -0.46),
                (0.1 - w, -0.2), (0.02 - w, 0.06), (-w - 0.05, -0.1)]  # fmt: skip
        for s in (-1, 1):
            side = [(w + 0.05, -0.2), (w + 0.12, 0.1), (w + 0.14, 0.32), (w, 0.46), (w - 0.1, 0.42), (w - 0.03, 0.26),
                    (w - 0.03, 0.05), (w - 0.08, -0.14)]  # fmt: skip
            locks.append(curve([(s * a, b) for a, b in side], closed=True))
    elif face.hair_style == "fringe":
        line = [(w + 0.05, -0.1), (w, 0.0), (w - 0.07, -0.13), (0.2 + x, -0.21), (x, -0.225), (x - 0.2, -0.21),
                (0.07 - w, -0.13), (-w, 0.0), (-w - 0.05, -0.1)]  # fmt: skip
        for s in (-1, 1):
            side = [(w + 0.05, -0.2), (w + 0.09, 0.2), (w + 0.1, 0.62), (w - 0.08, 0.64), (w - 0.03, 0.3), (w - 0.04, 0.0),
                    (w - 0.09, -0.14)]  # fmt: skip
            locks.append(curve([(s * a, b) for a, b in side], closed=True))
    elif face.hair_style == "afro":
        line = [(w + 0.05, -0.1), (w + 0.02, 0.0), (w - 0.05, -0.06), (w - 0.07, -0.24), (0.22 + x, -0.31), (0.1 + x, -0.37),
                (x - 0.1, -0.37), (x - 0.22, -0.31), (0.07 - w, -0.24), (0.05 - w, -0.06), (-w - 0.02, 0.0),
                (-w - 0.05, -0.1)]  # fmt: skip
    else:  # bun
        line = [(w + 0.04, -0.1), (w, 0.02), (w - 0.05, -0.1), (0.28 + x, -0.36), (x, -0.44), (x - 0.28, -0.36),
                (0.05 - w, -0.1), (-w, 0.02), (-w - 0.04, -0.1)]  # fmt: skip
    cap = np.concatenate([top, curve(line)])
    flip = np.array([p, 1.0]) if face.hair_style in ("side_part", "bob") else 1.0
    shapes = [cap * flip, *locks]
    below = brush.mask(*(shape + (0.0, 0.045) for shape in shapes)).within(skull)
    brush.fill(below.faded(0.5), _skin_dark(face))
    hair = brush.fill(brush.mask(*shapes), light, dark)
    shine = brush.spot(0.2 * face.light, -h * 0.82, 0.34, 0.15).within(hair)
    brush.fill(shine.faded(0.55), mix(face.hair, (255, 240, 220), 0.42))


# --- files -------------------------------------------------------------------------------------------------------------


def draw_face(seed: int, number: int, size: tuple[int, int] = (178, 218)) -> Image.Image:
    """Face `number` of the set `seed`: RGB, size (width, height); equal arguments give equal pixels (for one Pillow)."""
    return paint_face(sample_face(seed, number), size)
