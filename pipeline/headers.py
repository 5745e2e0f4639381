"""Height and width of a JPEG or PNG from its bytes, without decoding it, and whether the file is whole.

A decoder that meets a forged size allocates it, and one that meets a cut file may give up its whole pipeline; so every
file passes here first.  Only JPEG (8-bit baseline, extended, progressive) and PNG are read; what else decoders might
know is refused with its name, because not all of them know the same.

JPEG: ITU-T T.81, annex B.  PNG: W3C Portable Network Graphics, third edition.  Orientation: Exif 2.3, tag 0x0112.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

END_OF_IMAGE = b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples a pixel, by colour type."""
PNG_HEADER = ">IIBBBBB"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Left, top, step in x and in y of the passes of an interlaced PNG."""
DEFLATE_RATIO = 1032
"""What deflate can at most make of a byte: 258 bytes from 2 bits."""
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits a sample may have, by colour type."""
ORIENTATION = 0x0112
OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftyp", "HEIF, AVIF or a video"),
    (8, b"WEBP", "WebP"),
    (0, b"<", "HTML or XML"),
)
"""Offset, first bytes, name: so that a refusal can say what a file is instead."""


class BadImage(ValueError):
    """Why a file is left out: a few words that follow its name."""


def read_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels as a viewer shows them, that is after EXIF rotation.

    Args:
        data: the whole file; its end is looked at too.
        max_pixels: a header that promises more is refused.

    Raises:
        BadImage: not a whole JPEG or PNG of at most max_pixels.
    """
    if not data:
        raise BadImage("is empty")
    if data.startswith(b"\xff\xd8"):
        height, width, orientation = _jpeg(data, max_pixels)
    elif data.startswith(PNG_SIGNATURE):
        height, width, orientation = _png(data, max_pixels)
    else:
        names = [name for at, magic, name in OTHER_FORMATS if data.startswith(magic, at)]
        raise BadImage(f"is {names[0]}, neither JPEG nor PNG" if names else "is neither JPEG nor PNG")
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def check_png_content(data: bytes) -> None:
    """Inflates the content of a PNG that read_size accepts, for a full check: Pillow paints missing rows black, while
    libpng, and so DALI, gives up.

    Raises:
        BadImage: it does not inflate, or to fewer rows than the header promises.
    """
    inflater = zlib.decompressobj()
    missing = 0
    try:
        for kind, start, end in _png_chunks(data):
            if kind == b"IHDR":
                missing = _png_content_bytes(PngHeader(*struct.unpack_from(PNG_HEADER, data, start)))
            elif kind == b"IDAT" and missing > 0:
                waiting = data[start:end]
                while waiting and missing > 0:  # a piece at a time: the content may be a thousand times the file
                    missing -= len(inflater.decompress(waiting, 1 << 20))
                    waiting = inflater.unconsumed_tail
        missing -= len(inflater.flush()) if missing > 0 else 0
    except zlib.error as error:
        raise BadImage(f"has PNG content that does not inflate ({error})") from error
    if missing > 0:
        raise BadImage("has fewer rows than its PNG header promises")


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height == 0 or width == 0:
        raise BadImage("has no pixels by its header")
    if height * width > max_pixels:
        raise BadImage(f"has {width} x {height} pixels by its header, more than data.max_pixels = {max_pixels}")


def _jpeg(data: bytes, max_pixels: int) -> tuple[int, int, int]:
    """Height, width and orientation.  Walks the segments up to the first scan: thumbnails inside them are not seen."""
    size: tuple[int, int] | None = None
    orientation = 0
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 2 > len(data):
            raise BadImage("is cut short within the JPEG header")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stray bytes and markers without content
            at += 2
            continue
        if marker == 0xD9:
            raise BadImage("has no picture before its JPEG end marker")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(data):
            raise BadImage("is cut short within the JPEG header")
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            if size is not None:
                raise BadImage("has two JPEG frame headers")
            size = _jpeg_frame(marker, data[at + 4 : end])
            _check_pixels(*size, max_pixels)
        elif marker == 0xE1 and not orientation and data.startswith(b"Exif\0\0", at + 4):
            orientation = _orientation(data[at + 10 : end])
        at = end
    if size is None:
        raise BadImage("has no JPEG frame header")
    # Entropy-coded data never holds FF D9 (T.81 F.1.2.3 stuffs a zero), so the first one after the scan header is the
    # picture's own end, and a file cut within a scan has none, whatever thumbnails stand before or bytes follow.
    if not data.endswith(END_OF_IMAGE) and data.find(END_OF_IMAGE, end) < 0:
        raise BadImage("is cut short: no JPEG end marker")
    return *size, orientation


def _jpeg_frame(marker: int, content: bytes) -> tuple[int, int]:
    if marker > 0xC2:
        raise BadImage(f"is a JPEG of a rare kind (SOF{marker - 0xC0}: lossless, hierarchical or arithmetic)")
    if len(content) < 6:
        raise BadImage("has a damaged JPEG frame header")
    depth, height, width, components = struct.unpack_from(">BHHB", content)
    if depth != 8:
        raise BadImage(f"is a JPEG of {depth} bits a sample")
    if components not in (1, 3, 4):
        raise BadImage(f"is a JPEG of {components} components")
    return height, width


class PngHeader(NamedTuple):
    """The content of IHDR."""

    width: int
    height: int
    depth: int
    color: int
    compression: int
    filtering: int
    interlace: int


def _png(data: bytes, max_pixels: int) -> tuple[int, int, int]:
    """Height, width and orientation.  Hops over all chunks; those a decoder cannot do without must match their CRC."""
    view = memoryview(data)
    header: PngHeader | None = None
    seen: set[bytes] = set()
    orientation = packed = 0
    for kind, start, end in _png_chunks(data):
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage(f"is damaged: PNG chunk {ascii(kind)[1:]} does not match its checksum")
        if header is None:
            if kind != b"IHDR" or end - start != struct.calcsize(PNG_HEADER):
                raise BadImage("has no PNG header")
            header = PngHeader(*struct.unpack_from(PNG_HEADER, data, start))
            depths = PNG_DEPTHS.get(header.color, ())
            if header.depth not in depths or header.compression or header.filtering or header.interlace > 1:
                raise BadImage("has a damaged PNG header")
            _check_pixels(header.height, header.width, max_pixels)
        elif kind == b"IDAT":
            packed += end - start
        elif kind == b"eXIf" and not orientation:
            orientation = _orientation(data[start:end])
        seen.add(kind)
    if header is None or b"IDAT" not in seen or (header.color == 3 and b"PLTE" not in seen):
        raise BadImage("has no picture before its PNG end chunk")
    if packed * DEFLATE_RATIO < _png_content_bytes(header):
        raise BadImage(f"has too little PNG content for {header.width} x {header.height} pixels")
    return header.height, header.width, orientation


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of each chunk, IEND the last. Raises BadImage where the file ends sooner."""
    kind = b""
    at = len(PNG_SIGNATURE)
    while kind != b"IEND":
        kind = data[at + 4 : at + 8]
        start = at + 8
        end = start + int.from_bytes(data[at : at + 4], "big")
        at = end + 4
        if len(kind) < 4 or at > len(data):
            raise BadImage("is cut short: no PNG end chunk")
        yield kind, start, end


def _png_content_bytes(header: PngHeader) -> int:
    """Bytes of all rows with their filter bytes, once inflated."""
    bits = header.depth * PNG_SAMPLES[header.color]
    total = 0
    for left, top, step_x, step_y in ADAM7 if header.interlace else ((0, 0, 1, 1),):
        width = -((left - header.width) // step_x)
        height = -((top - header.height) // step_y)
        if width > 0 and height > 0:
            total += height * (1 + (width * bits + 7) // 8)
    return total


def _orientation(tiff: bytes) -> int:
    """The orientation tag of the first directory; 0 where there is none or it is damaged, as decoders take it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return 0
    start = struct.unpack_from(order + "I", tiff, 4)[0]
    if start + 2 > len(tiff):
        return 0
    count = struct.unpack_from(order + "H", tiff, start)[0]
    for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if tag == ORIENTATION and kind in (3, 4):  # a 16-bit or 32-bit number
            return int(struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)[0])
    return 0
