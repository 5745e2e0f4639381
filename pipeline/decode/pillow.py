"""The reference decoder: Pillow in a pool of threads, on any machine.

Pillow leaves the interpreter lock while it decodes and resizes, so the threads really run side by side.  JPEG `draft`
(decoding at a fraction of the size) is not used: it is faster and gives other pixels than every other decoder.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from pipeline.decode import Pixels
from pipeline.errors import DataError
from pipeline.geometry import place
from pipeline.index import Dataset
from pipeline.samples import Samples
from pipeline.sources import one_line, shown

PNG = b"\x89PNG\r\n\x1a\n"

FORMATS = ("JPEG", "PNG")
"""What the index lets through, so that no other of Pillow's readers is tried."""

CHUNK = 8
"""Images a thread takes at once: fewer hand-overs, still an even share for every thread at batch 64."""

# What Pillow raises on damaged content; cutting and altering 4,500 files met only the first (Pillow 13, 2026-11).
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits to gray of 8: v / 257 rounded.  Pillow's own convert clips at 255 instead."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _colours(image: Image.Image) -> Image.Image:
    """The image as RGB; alpha is dropped."""
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _opened(data: Pixels, size: tuple[int, int], name: str) -> Iterator[Image.Image]:
    """The image, turned as its EXIF data says.

    Raises:
        DataError: the file is damaged, or is not the one that was indexed.
    """
    try:
        with Image.open(io.BytesIO(data.data), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if (image.height, image.width) != size:
                found = f"is {image.height} x {image.width} pixels, and was {size[0]} x {size[1]} when it was indexed"
                raise DataError(f"{shown(name)} {found}")
            yield image
    except _DAMAGED as error:
        raise DataError(f"{shown(name)} cannot be decoded ({one_line(error)})") from error


def _cut(image: Image.Image, size: tuple[int, int], window: tuple[int, int]) -> Image.Image:
    """Resize to cover the window and cut it from the middle."""
    spot = place(*size, window)
    resized = image.resize((spot.width, spot.height), Image.Resampling.BILINEAR)  # with antialias, as DALI's linear
    return resized.crop((spot.left, spot.top, spot.left + window[1], spot.top + window[0]))


def _alpha(image: Image.Image) -> Image.Image | None:
    """Alpha alone, whether a channel, a palette's or one transparent colour; None: the image is opaque."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def decode(data: Pixels, size: tuple[int, int], window: tuple[int, int], channels: int, name: str) -> Pixels:
    """One encoded file to a window of pixels.

    Alpha is resized apart: Pillow would weigh the colours of RGBA with it, and the RGB of nc = 4 shall be that of 3.

    Args:
        data: (length,) the file.
        size: (height, width) after EXIF rotation that the index found.
        window: (H, W) to cover and to cut from the middle.
        channels: 1, 3 or 4 (alpha: 255 where the file has none).
        name: the file's, for messages.

    Returns:
        (H, W, channels) uint8.

    Raises:
        DataError: the file is damaged, or is not the one that was indexed.
    """
    with _opened(data, size, name) as image:
        pixels = _cut(_colours(image), size, window)
        if channels == 1:
            return np.asarray(pixels.convert("L"))[..., None]
        if channels == 3:
            return np.asarray(pixels)
        alpha = _alpha(image)
        pixels.putalpha(255 if alpha is None else _cut(alpha, size, window))
        return np.asarray(pixels)


def alpha_window(data: Pixels, size: tuple[int, int], name: str, window: tuple[int, int]) -> Pixels:
    """(H, W, 1) uint8: the alpha of decode(); a file other than PNG has none and is not opened."""
    if data[:8].tobytes() == PNG:
        with _opened(data, size, name) as image:
            alpha = _alpha(image)
            if alpha is not None:
                return np.asarray(_cut(alpha, size, window))[..., None]
    return np.full((*window, 1), 255, np.uint8)


class PillowDecoder:
    """Windows of a dataset's items, decoded by `threads` threads; a bad file's is that of the next good one."""

    def __init__(self, source: Samples | Dataset, window: tuple[int, int], channels: int, threads: int) -> None:
        assert threads >= 1
        self.samples = Samples.of(source)
        self.window = window
        self.channels = channels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")

    def _fill(self, out: Pixels, items: np.ndarray) -> None:
        for row, item in zip(out, items.tolist(), strict=True):
            row[...] = self._decoded(item)

    def _decoded(self, item: int) -> Pixels:
        while True:
            sample = self.samples.read(item)
            try:
                return decode(sample.data, sample.size, self.window, self.channels, sample.key)
            except DataError as error:
                self.samples.reject(sample.item, error)

    def _submit(self, items: np.ndarray) -> tuple[Pixels, list[Future[None]]]:
        out = np.empty((len(items), *self.window, self.channels), np.uint8)
        chunks = range(0, len(items), CHUNK)
        return out, [self._pool.submit(self._fill, out[i : i + CHUNK], items[i : i + CHUNK]) for i in chunks]

    def windows(self, batches: Iterable[np.ndarray]) -> Iterator[Pixels]:
        """(N, H, W, C) windows for each (N,) batch of items, in order.

        The threads begin a batch while the one before it is finished, so that none idles at its end.

        Raises:
            DataError: no file of the dataset is good any more.
        """
        begun: list[tuple[Pixels, list[Future[None]]]] = []
        for items in batches:
            begun.append(self._submit(items))
            if len(begun) == 2:
                yield _finish(*begun.pop(0))
        for batch in begun:
            yield _finish(*batch)

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)


def _finish(out: Pixels, futures: list[Future[None]]) -> Pixels:
    for future in futures:
        future.result()
    return out
