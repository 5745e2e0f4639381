"""Cartoon faces drawn from numbers: a set to learn from when there are no photographs.

Every face is a pure function of (seed, number): first its traits are sampled (`sample_face`), then it is painted layer
by layer (`paint_face`).  The drawings are made for a 64 x 64 GAN: centred heads, large eyes, soft edges, and colours of
skin, hair, clothes and background that are kept apart, so that what matters is a region and never a thin line.

Lengths are in units of half the picture's short side: the square that a centre crop keeps is [-1, 1] x [-1, 1], y down.
Drawing and writing 6,000 faces takes 14 s on 2 idle cores (Pillow 13.0, 2026-11).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from pipeline.drawing import Brush, Colour, Mask, Shape, arc, curve, distance, mirrored, mix, stroke

DRAWING_VERSION = 2
"""Raised whenever the same (seed, number) would give another picture, so that an older set on disk is not reused."""

T = TypeVar("T")

TRAITS, FILE = range(2)
"""What random numbers are drawn for."""

# fmt: off
SKINS: Sequence[Colour] = (  # from light to deep; a face's skin lies anywhere between two neighbours
    (255, 226, 202), (252, 210, 178), (242, 192, 152), (226, 170, 126),
    (204, 144, 102), (176, 116, 78), (148, 96, 68), (126, 82, 62),
)
HAIRS: dict[str, Colour] = {
    "black": (36, 32, 40), "espresso": (66, 42, 34), "chestnut": (112, 66, 40), "auburn": (148, 52, 34),
    "ginger": (214, 102, 38), "blonde": (236, 188, 92), "platinum": (246, 228, 178), "grey": (164, 166, 176),
}
BACKGROUNDS: Sequence[Colour] = (
    (120, 182, 228), (134, 208, 190), (196, 178, 232), (246, 168, 172), (252, 218, 128),
    (84, 124, 178), (70, 152, 148), (232, 236, 242), (132, 112, 168), (250, 186, 120),
)
CLOTHES: Sequence[Colour] = (
    (44, 62, 106), (196, 62, 62), (62, 130, 92), (226, 166, 52), (244, 244, 240),
    (118, 72, 140), (48, 148, 160), (60, 62, 72), (232, 122, 146),
)
IRISES: Sequence[Colour] = ((78, 48, 32), (56, 36, 28), (64, 112, 168), (70, 130, 84), (96, 110, 124))
RIMS: Sequence[Colour] = ((34, 34, 42), (34, 34, 42), (124, 46, 40), (40, 64, 120))
# fmt: on
WHITE: Colour = (255, 255, 255)
INK: Colour = (38, 30, 36)
NIGHT: Colour = (24, 12, 24)

MOUTHS = ("smile", "open", "neutral")
COLLARS = ("crew", "v_neck", "shirt")


@dataclass(frozen=True, kw_only=True)
class Face:
    """The traits of one person in one pose: everything that `paint_face` needs to know."""

    skin: Colour
    hair: Colour
    hair_name: str
    """The key of HAIRS that `hair` is a shade of."""
    hair_style: str
    iris: Colour
    background: Colour
    clothes: Colour
    collar: str
    mouth: str
    glasses: str
    """One of none, round, square."""
    rim: Colour
    beard: str
    """One of none, beard, moustache."""
    width: float
    """Half the head's width, in units."""
    height: float
    """Half the head's height, in units."""
    jaw: float
    """How much the head narrows to the chin; 0 is an ellipse."""
    eye: float
    """Half an eye's width, in units."""
    eye_open: float
    """An eye's height over its width."""
    eye_gap: float
    """From the face's middle line to an eye's centre, in units."""
    brow: float
    """How far the brows' outer ends hang, in units; negative is raised."""
    lips: float
    """Half the mouth's width, in units."""
    side: int
    """-1 or 1: to which side the hair is parted."""
    volume: float
    """How much of curls or bun there is, -1 to 1."""
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


def uniforms(seed: int, number: int, purpose: int) -> Iterator[float]:
    """Doubles in [0, 1): numpy's other distributions may change with its version, these do not."""
    # Number and purpose sit above the word that Philox counts with, so that no two sequences share a number.
    bits = np.random.Philox(key=seed % 2**64, counter=(purpose << 128) + (number << 64))
    return iter(np.random.Generator(bits).random(64).tolist())


def sample_face(seed: int, number: int) -> Face:
    """Traits of face `number`; no two areas that touch get colours that are hard to tell apart."""
    draw = uniforms(seed, number, TRAITS)

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(draw)

    def one_of(options: Sequence[T]) -> T:
        return options[int(next(draw) * len(options))]

    def apart(options: Sequence[Colour], *others: Colour) -> Colour:
        """One of the options that stands out from the others; if none does, the one that stands out most."""
        contrast = [min(distance(option, other) for other in others) for option in options]
        floor = min(84.0, max(contrast))
        return one_of([option for option, value in zip(options, contrast, strict=True) if value >= floor])

    tone = between(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    rare = ("ginger", "platinum") if tone > 4 else ()
    hair = apart([colour for name, colour in HAIRS.items() if name not in rare], skin)
    hair_name = next(name for name, colour in HAIRS.items() if colour == hair)
    hair = mix(hair, mix(INK, WHITE, between(0, 1)), 0.06)
    style = one_of(HAIR_STYLES)
    background = mix(apart(BACKGROUNDS, skin, hair), WHITE, between(0, 0.15))
    bearded = next(draw) < 0.34 and style in UNCOVERED_EARS
    beard = one_of(("beard", "beard", "moustache"))
    spectacles = next(draw) < 0.25
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
        height=between(0.57, 0.6),
        jaw=between(0.12, 0.26),
        eye=between(0.118, 0.132),
        eye_open=between(0.82, 0.96),
        eye_gap=between(0.198, 0.212),
        brow=between(-0.02, 0.035),
        lips=between(0.165, 0.2),
        side=one_of((-1, 1)),
        volume=between(-1, 1),
        light=one_of((-1.0, 1.0)) * between(0.5, 1.0),
        tilt=math.radians(between(-4, 4)),
        turn=between(-1, 1),
        shift=(between(-0.035, 0.035), between(0.04, 0.08)),
        zoom=between(1.08, 1.14),
    )


def paint_face(face: Face, size: tuple[int, int]) -> Image.Image:
    """The picture of a face, RGB of size (width, height); the head lies in the central square."""
    scale = min(size) / 2
    middle, shift = np.array(size) / 2, np.array(face.shift) * scale
    picture, shadow = _background(face, size), _shadow(face, size)
    body = Brush(picture, shadow, middle + shift * 0.6, scale * face.zoom)
    head = Brush(picture, shadow, middle + shift, scale * face.zoom, face.tilt)
    front = head.moved(0.06 * face.turn, 0)  # eyes and mouth lie nearer than the skull and move more as it turns
    _paint_back_hair(head, face)
    _paint_body(body, face)
    skull = _paint_head(head, face)
    _paint_beard(front, face, skull)
    _paint_eyes(front, face)
    _paint_nose_and_mouth(front, face)
    _paint_front_hair(head, face, skull)
    _paint_brows(front, face)
    _paint_glasses(front, face)
    return picture


def _background(face: Face, size: tuple[int, int]) -> Image.Image:
    """A gradient: lighter towards the light, darker below."""
    x, y = np.meshgrid([-0.5, 0.5], [-0.5, 0.5])
    light = (0.5 + 0.45 * face.light * x - 0.5 * y)[..., None]
    low, high = np.array(mix(face.background, INK, 0.16)), np.array(mix(face.background, WHITE, 0.3))
    corners = Image.fromarray((low + (high - low) * light).astype(np.uint8))
    return corners.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _shadow(face: Face, size: tuple[int, int]) -> Image.Image:
    """Grayscale, 255 on the side that the light does not reach."""
    x, y = np.meshgrid(np.linspace(-1, 1, 16) * size[0] / min(size), np.linspace(-1, 1, 16) * size[1] / min(size))
    t = np.clip(0.3 - 0.8 * face.light * (x - face.shift[0]) + 0.2 * (y - face.shift[1]), 0, 1)
    return Image.fromarray((255 * t * t * (3 - 2 * t)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _skin_dark(face: Face) -> Colour:
    red, green, blue = face.skin
    return int(red * 0.8), int(green * 0.68), int(blue * 0.67)


def _paint_body(brush: Brush, face: Face) -> None:
    """Shoulders in clothes, the neck, and what the collar shows of it."""
    dark, clothes = _skin_dark(face), face.clothes
    shoulders = curve(mirrored([(0.94, 1.5), (0.86, 0.98), (0.62, 0.78), (0.26, 0.68), (0, 0.66)]), closed=True)
    brush.paint(clothes, shoulders, dark=mix(clothes, (20, 16, 40), 0.32))
    neck = np.array(mirrored([(0.2, 0.3), (0.2, 0.7)]))
    if face.collar == "crew":
        brush.paint(mix(clothes, WHITE if sum(clothes) < 480 else INK, 0.25), arc(0, 0.7, 0.31, 0.2))
        opening = arc(0, 0.69, 0.255, 0.15)
    else:
        opening = np.array([(-0.2, 0.66), (0.2, 0.66), (0, 1.02 if face.collar == "v_neck" else 0.9)])
    skin = brush.paint(face.skin, neck, opening, dark=dark)
    brush.fill(brush.mask(arc(0, 0.42, 0.42, 0.3)).within(skin).faded(0.75), dark)  # the chin's shadow
    if face.collar == "shirt":
        flap = np.array([(0.2, 0.62), (0.32, 0.7), (0.2, 1.0), (0.0, 0.88)])
        brush.paint(mix(clothes, WHITE, 0.35) if sum(clothes) < 660 else mix(clothes, INK, 0.16), flap, flap * (-1, 1))


def _outline(face: Face, grow: float = 0.0) -> Shape:
    """The head's edge."""
    t = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    x, y = np.sin(t), -np.cos(t)
    narrow = 1 - face.jaw * np.clip(y, 0, 1) ** 2
    return np.stack([(face.width + grow) * x * narrow + 0.02 * face.turn * y, (face.height + grow) * y], axis=1)


def _paint_head(brush: Brush, face: Face) -> Mask:
    dark = _skin_dark(face)
    for s in (-1, 1) if face.hair_style in UNCOVERED_EARS else ():
        x = s * (face.width + 0.01) - 0.03 * face.turn
        brush.paint(face.skin, arc(x, 0.06, 0.085, 0.13), dark=dark)
        brush.paint(mix(face.skin, dark, 0.6), arc(x + 0.01 * s, 0.06, 0.045, 0.08))
    skull = brush.paint(face.skin, _outline(face), dark=dark)
    glow = brush.spot(0.16 * face.light + 0.05 * face.turn, -0.12, 0.42, 0.46).within(skull)
    brush.fill(glow.faded(0.4), mix(face.skin, (255, 246, 226), 0.45))
    for s in (-1, 1):
        cheek = brush.spot(0.27 * s + 0.06 * face.turn, 0.2, 0.17, 0.13).within(skull)
        brush.fill(cheek.faded(0.5), mix(face.skin, (236, 76, 84), 0.45 if sum(face.skin) > 460 else 0.3))
    return skull


def _paint_eyes(brush: Brush, face: Face) -> None:
    r, y, gaze = face.eye, -0.02, 0.018 * face.turn
    for x in (-face.eye_gap, face.eye_gap):
        brush.paint(mix(face.hair, INK, 0.85), arc(x, y - 0.02, r * 1.1, r * (face.eye_open + 0.1)))  # upper lashes
        white = brush.paint((252, 252, 255), arc(x, y, r, r * face.eye_open))
        brush.fill(brush.mask(arc(x + gaze, y, r * 0.7, r * 0.74)).within(white), face.iris)
        brush.paint((18, 14, 20), arc(x + gaze, y, r * 0.38, r * 0.4))
        brush.paint(WHITE, arc(x + gaze + 0.03 * face.light, y - 0.03, r * 0.24, r * 0.24))


def _paint_brows(brush: Brush, face: Face) -> None:
    brow = stroke([(0.09, -0.17), (0.2, -0.205), (0.32, -0.17 + face.brow)], 0.055)
    brush.paint(mix(face.hair, INK, 0.3 if sum(face.hair) > 300 else 0.0), brow, brow * (-1, 1))


def _paint_nose_and_mouth(brush: Brush, face: Face) -> None:
    nose = brush.moved(0.025 * face.turn, 0)
    nose.fill(nose.mask(arc(0, 0.155, 0.075, 0.055)).faded(0.75), _skin_dark(face))
    nose.paint(mix(face.skin, (255, 244, 224), 0.16), arc(0, 0.13, 0.066, 0.055))
    w, lip = face.lips, mix(face.skin, (188, 30, 54), 0.66)
    if face.mouth == "open":
        edge = mirrored([(0, 0.315), (w, 0.285), (0.62 * w, 0.41), (0, 0.445)])
        mouth = brush.paint((116, 26, 40), curve(edge, closed=True))
        brush.fill(brush.mask(arc(0, 0.45, 0.6 * w, 0.06)).within(mouth), (222, 92, 100))
        brush.fill(brush.mask(arc(0, 0.29, 0.9 * w, 0.062)).within(mouth), WHITE)
    elif face.mouth == "smile":
        brush.paint(lip, stroke(mirrored([(w, 0.285), (0.5 * w, 0.34), (0, 0.358)]), 0.062, 0.35))
    else:
        brush.paint(lip, stroke(mirrored([(0.8 * w, 0.318), (0.3 * w, 0.33), (0, 0.334)]), 0.066, 0.3))


def _paint_beard(brush: Brush, face: Face, skull: Mask) -> None:
    if face.beard == "none":
        return
    light, dark = _hair_tones(face)
    half = [(0, 0.225), (0.14, 0.235), (0.23, 0.33), (0.1, 0.29), (0, 0.28)]
    shapes = [curve(mirrored(half), closed=True)]
    if face.beard == "beard":
        chin = _outline(face, 0.02) - (0.06 * face.turn, 0)  # the head's own edge, which does not move with the mouth
        chin = chin[chin[:, 1] > 0.08]
        right, left = chin[0], chin[-1]
        sides = np.array([0.09, 0.14])
        upper = [left, left + sides, (-0.2, 0.25), (0, 0.225), (0.2, 0.25), right + sides * (-1, 1), right]
        shapes.append(np.concatenate([chin, curve(np.array(upper))]))
    brush.paint(light, *shapes, dark=dark)
    if face.beard == "beard":
        brush.paint(mix(face.skin, _skin_dark(face), 0.35), arc(0, 0.345, face.lips + 0.02, 0.075))


def _paint_glasses(brush: Brush, face: Face) -> None:
    if face.glasses == "none":
        return
    rim = 0.042
    edge = arc(0, 0, 1, 1)
    edge = np.sign(edge) * np.abs(edge) ** (1.0 if face.glasses == "round" else 0.5)
    for s in (-1, 1):
        place = (s * (face.eye_gap + 0.005), -0.015)
        outer, inner = edge * (0.192, 0.182) + place, edge * (0.192 - rim, 0.182 - rim) + place
        brush.fill(brush.mask(inner).faded(0.13), WHITE)
        temple = stroke([(s * (face.eye_gap + 0.17), -0.065), (s * face.width, -0.045)], rim, 1.0)
        brush.paint(face.rim, np.concatenate([outer, inner[::-1]]), temple)
    brush.paint(face.rim, stroke([(-0.06, -0.045), (0, -0.065), (0.06, -0.045)], rim, 1.0))


class Hairdo(NamedTuple):
    """Outlines of a style: right halves from the outside to the middle, as (a, b, y) with x = a * Face.width + b."""

    hairline: Sequence[tuple[float, float, float]]
    """Lower edge of the hair over the forehead; the whole edge from right to left if `parted`."""
    back: Sequence[tuple[float, float, float]] = ()
    """What is seen behind head and shoulders."""
    lock: Sequence[tuple[float, float, float]] = ()
    """What falls in front of the shoulders, drawn on both sides."""
    parted: bool = False


# fmt: off
HAIRDOS = {
    "short": Hairdo(
        hairline=[(1, .05, -.1), (1, .02, .05), (1, -.05, 0), (1, -.08, -.22), (0, .2, -.34), (0, 0, -.36)]),
    "side_part": Hairdo(
        hairline=[(1, .05, -.1), (1, .02, .04), (1, -.04, -.02), (1, -.06, -.24), (0, .22, -.27), (0, 0, -.34),
                  (0, -.2, -.47), (0, -.24, -.42), (-1, .06, -.24), (-1, .04, -.02), (-1, -.02, .04), (-1, -.05, -.1)],
        parted=True),
    "afro": Hairdo(
        hairline=[(1, .05, -.1), (1, .02, 0), (1, -.05, -.06), (1, -.07, -.24), (0, .22, -.31), (0, .1, -.37)]),
    "bun": Hairdo(hairline=[(1, .04, -.1), (1, 0, .02), (1, -.05, -.1), (0, .28, -.36), (0, 0, -.44)]),
    "straight": Hairdo(
        hairline=[(1, .05, -.1), (1, -.01, .06), (1, -.07, -.12), (0, .2, -.36), (0, 0, -.5)],
        back=[(0, .2, 1.05), (1, .17, 1.), (1, .15, .5), (1, .12, -.1), (.7, 0, -.46), (0, 0, -.68)],
        lock=[(1, .05, -.2), (1, .1, .1), (1, .1, .4), (1, .12, .7), (1, .06, .96), (1, -.12, .94), (1, -.08, .7),
              (1, -.03, .4), (1, -.03, .1), (1, -.09, -.16)]),
    "wavy": Hairdo(
        hairline=[(1, .05, -.1), (1, -.01, .06), (1, -.07, -.12), (0, .2, -.36), (0, 0, -.5)],
        back=[(1, 0, .98), (1, .25, .84), (1, .17, .6), (1, .24, .36), (1, .12, .08), (1, .17, -.22), (.8, 0, -.44),
              (0, 0, -.64)],
        lock=[(1, .05, -.2), (1, .15, .1), (1, .05, .4), (1, .17, .7), (1, .06, .96), (1, -.12, .94), (1, -.03, .7),
              (1, -.08, .4), (1, -.03, .1), (1, -.09, -.16)]),
    "bob": Hairdo(
        hairline=[(1, .05, -.1), (1, -.02, .06), (1, -.06, -.14), (0, .26, -.25), (0, .06, -.3), (0, -.18, -.46),
                  (-1, .1, -.2), (-1, .02, .06), (-1, -.05, -.1)],
        back=[(1, -.2, .46), (1, .06, .5), (1, .18, .3), (1, .13, -.1), (.75, 0, -.47), (0, 0, -.68)],
        lock=[(1, .05, -.2), (1, .12, .1), (1, .14, .32), (1, 0, .46), (1, -.1, .42), (1, -.03, .26), (1, -.03, .05),
              (1, -.08, -.14)],
        parted=True),
    "fringe": Hairdo(
        hairline=[(1, .05, -.1), (1, 0, 0), (1, -.07, -.13), (0, .2, -.21), (0, 0, -.225)],
        back=[(1, -.2, .7), (1, .13, .68), (1, .14, .4), (1, .11, -.1), (.75, 0, -.47), (0, 0, -.68)],
        lock=[(1, .05, -.2), (1, .09, .2), (1, .1, .62), (1, -.08, .64), (1, -.03, .3), (1, -.04, 0), (1, -.09, -.14)]),
}
# fmt: on
HAIR_STYLES = tuple(HAIRDOS)
UNCOVERED_EARS = tuple(style for style, hairdo in HAIRDOS.items() if not hairdo.lock)


def _fitted(face: Face, outline: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """A hairdo's outline on this head: a forehead higher than the usual 0.585 lifts what lies above the eyes."""
    return [(a * face.width + b, y * (face.height / 0.585 if y < 0 else 1)) for a, b, y in outline]


def _hair_tones(face: Face) -> tuple[Colour, Colour]:
    """Hair in the light and in the shade."""
    return mix(face.hair, WHITE, 0.06), mix(face.hair, NIGHT, 0.34)


def _paint_back_hair(brush: Brush, face: Face) -> None:
    """What of the hair lies behind the head and the shoulders."""
    light, dark = _hair_tones(face)
    grow = 0.03 * face.volume
    if face.hair_style == "afro":
        brush.paint(mix(light, dark, 0.25), arc(0, -0.22, 0.66 + grow, 0.6 + grow, bumps=0.09), dark=dark)
    elif face.hair_style == "bun":
        brush.paint(mix(light, dark, 0.25), arc(0, -face.height - 0.13, 0.2 + grow, 0.18 + grow), dark=dark)
    elif back := HAIRDOS[face.hair_style].back:
        brush.paint(mix(face.hair, NIGHT, 0.24), curve(mirrored(_fitted(face, back)), closed=True), dark=dark)


def _paint_front_hair(brush: Brush, face: Face, skull: Mask) -> None:
    """The cap of hair over the forehead and the locks beside it, with their shadow on the face and their shine."""
    w, h = face.width, face.height
    hairdo = HAIRDOS[face.hair_style]
    top = arc(0, -0.1, w + 0.05, h, 180, 360)
    if face.hair_style == "side_part":  # swept up from the parting
        sweep = [(-1, -0.05, -0.1), (-1, -0.03, -0.36), (-0.62, 0, -0.56), (0, 0, -0.72)]
        sweep += [(0.6, 0, -0.66), (0.95, 0, -0.45), (1, 0.06, -0.26), (1, 0.05, -0.1)]
        top = curve(_fitted(face, sweep))
    hairline = _fitted(face, hairdo.hairline)
    line = curve(hairline if hairdo.parted else mirrored(hairline))
    line[:, 0] += 0.04 * face.turn * (1 - np.abs(line[:, 0]) / (w + 0.1))
    cap = np.concatenate([top, line]) * ((face.side, 1) if hairdo.parted else (1, 1))
    shapes = [cap]
    if hairdo.lock:
        lock = curve(_fitted(face, hairdo.lock), closed=True)
        shapes += [lock, lock * (-1, 1)]
    offset = np.array([0, 0.045])
    below = brush.mask(*(shape + offset for shape in shapes)).within(skull)
    brush.fill(below.faded(0.5), _skin_dark(face))
    light, dark = _hair_tones(face)
    hair = brush.paint(light, *shapes, dark=dark)
    shine = brush.spot(0.2 * face.light, -h * 0.82, 0.34, 0.15).within(hair)
    brush.fill(shine.faded(0.55), mix(face.hair, (255, 240, 220), 0.42))


def draw_face(seed: int, number: int, size: tuple[int, int] = (178, 218)) -> Image.Image:
    """Face `number` of set `seed`: RGB, size (width, height); equal arguments give equal pixels (for one Pillow)."""
    return paint_face(sample_face(seed, number), size)
