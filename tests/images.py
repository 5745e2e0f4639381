"""Images as untidy as real data is, written into a folder: good ones that look odd, and bad ones.

Every good one shows the same scene (portrait()), so that a decoder's result can be told right from wrong.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 96, 80
"""Pixels of every good image as a person sees it, that is after EXIF rotation."""


def portrait(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: a smooth background, a face off centre; no symmetry, so that a flip or turn shows."""
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    scene = np.stack([60 + 120 * x, 90 + 100 * y, 200 - 120 * x * y], axis=-1)
    face = ((x - 0.42) / 0.27) ** 2 + ((y - 0.52) / 0.33) ** 2 < 1
    scene[face] = (224, 172, 140)
    scene[((x - 0.33) / 0.05) ** 2 + ((y - 0.42) / 0.04) ** 2 < 1] = (30, 40, 60)
    scene[((x - 0.53) / 0.05) ** 2 + ((y - 0.42) / 0.04) ** 2 < 1] = (30, 40, 60)
    return scene.round().astype(np.uint8)


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92} | options)  # type: ignore[arg-type]
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_bytes(height: int, width: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG from its parts; rows are the pixels without the filter bytes.  Pillow writes no 16-bit colour."""
    stride = len(rows) // height if height else 0
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(filtered)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_thumbnail(jpeg: bytes) -> bytes:
    """The JPEG with a small JPEG, end marker and all, inside an application segment, as cameras write it."""
    thumbnail = jpeg_bytes(Image.fromarray(portrait(24, 20)))
    return jpeg[:2] + b"\xff\xec" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + jpeg[2:]


def forged_jpeg(height: int, width: int) -> bytes:
    """A small valid JPEG whose frame header promises height x width pixels."""
    data = bytearray(jpeg_bytes(Image.fromarray(portrait())))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def odd_images(folder: Path) -> dict[str, Path]:
    """Good files by name; each decodes to HEIGHT x WIDTH.  Gray: gray*, one_bit*; all others have colour."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = portrait()
    rgb = Image.fromarray(scene)
    gray = rgb.convert("L")
    alpha = Image.fromarray(np.linspace(40, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    gray_alpha = gray.copy()
    gray_alpha.putalpha(alpha)
    palette = rgb.quantize(64)
    deep = scene.astype(np.uint16) * 257
    deep_gray = np.asarray(gray).astype(np.uint16) * 257
    lying = rgb.transpose(Image.Transpose.ROTATE_90)  # orientation 6: the viewer turns it a quarter clockwise
    plain = jpeg_bytes(rgb)

    files: dict[str, tuple[str, bytes]] = {
        "rgb": ("rgb.jpg", plain),
        "gray": ("gray.jpg", jpeg_bytes(gray)),
        "cmyk": ("cmyk.jpg", jpeg_bytes(rgb.convert("CMYK"))),
        "progressive": ("progressive.jpg", jpeg_bytes(rgb, progressive=True)),
        "exif_rotated": ("exif_rotated.jpg", jpeg_bytes(lying, exif=exif(6))),
        "exif_mirrored": (
            "exif_mirrored.jpeg",
            jpeg_bytes(rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), exif=exif(2)),
        ),
        "restart_markers": ("restart_markers.JPG", jpeg_bytes(rgb, restart_marker_rows=1)),
        "full_chroma": ("full_chroma.jpg", jpeg_bytes(rgb, subsampling=0)),
        "trailing_bytes": ("trailing_bytes.jpg", plain + b"\0" * 700 + b"written by a camera"),
        "thumbnail": ("thumbnail.jpg", with_thumbnail(plain)),
        "gray16": ("gray16.png", png_bytes(HEIGHT, WIDTH, 16, 0, deep_gray.astype(">u2").tobytes())),
        "rgb16": ("rgb16.png", png_bytes(HEIGHT, WIDTH, 16, 2, deep.astype(">u2").tobytes())),
    }
    for name, image, options in (
        ("rgba", rgba, {}),
        ("gray_alpha", gray_alpha, {}),
        ("palette", palette, {}),
        ("palette_transparent", palette, {"transparency": 0}),
        ("one_bit", gray.convert("1"), {}),
        ("rgb_png", rgb, {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        files[name] = (f"{name}.png", buffer.getvalue())
    return _write(folder, files)


def bad_images(folder: Path) -> dict[str, Path]:
    """Files that a decoder must never see, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = Image.fromarray(portrait())
    plain = jpeg_bytes(rgb)
    large = jpeg_bytes(Image.fromarray(portrait(480, 400)), quality=95)
    png = png_bytes(HEIGHT, WIDTH, 8, 2, portrait().tobytes())
    files: dict[str, tuple[str, bytes]] = {
        "truncated_jpeg": ("truncated.jpg", plain[: len(plain) * 2 // 3]),
        "truncated_large_jpeg": ("truncated_large.jpg", large[: len(large) // 2]),
        # The thumbnail's end marker is still there, the picture's is not.
        "truncated_thumbnail_jpeg": ("truncated_thumbnail.jpg", with_thumbnail(plain)[: -len(plain) // 3]),
        "header_only_jpeg": ("header_only.jpg", plain[: plain.index(b"\xff\xda")] + b"\xff\xd9"),
        "truncated_png": ("truncated.png", png[: len(png) * 2 // 3]),
        "text": ("text.jpg", b"This is not a photograph.\n"),
        "empty": ("empty.jpg", b""),
        "forged_jpeg": ("forged.jpg", forged_jpeg(30_000, 30_000)),
        "forged_png": ("forged.png", _forged_png(30_000, 30_000)),
        "zero_pixels_jpeg": ("zero_pixels.jpg", forged_jpeg(0, 80)),
        "hollow_png": ("hollow.png", _forged_png(7_000, 7_000)),  # within the pixel limit, its content is not
        "zero_pixels_png": ("zero_pixels.png", _forged_png(0, 80)),
    }
    return _write(folder, files)


def _forged_png(height: int, width: int) -> bytes:
    """A small valid PNG whose header, checksum included, promises height x width pixels."""
    good = png_bytes(HEIGHT, WIDTH, 8, 2, portrait().tobytes())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return good[:8] + png_chunk(b"IHDR", header) + good[8 + 25 :]


def _write(folder: Path, files: dict[str, tuple[str, bytes]]) -> dict[str, Path]:
    paths = {}
    for name, (file, data) in files.items():
        paths[name] = folder / file
        paths[name].write_bytes(data)
    return paths
