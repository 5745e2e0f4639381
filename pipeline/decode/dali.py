"""The fast decoder: NVIDIA DALI in pipeline mode, one graph for the GPU and the CPU.

    file bytes -> decode (GPU: `mixed`, else the CPU) -> resize -> crop -> mirror -> colour -> uint8 (N, H, W, C)

The graph holds no chance and no files: a callback hands it each batch's bytes together with the sizes, places and
colour factors of every image.  The callback runs in the thread that asks for batches, DALI's own threads do the rest.

A file that does not decode ends DALI's pipeline without being named.  It is looked for and replaced, as
pipeline/samples.py says, and a new pipeline runs the batches in flight again: none is lost, doubled or out of order.

Outputs are handed over by DLPack.  On the CPU without a copy: DALI's dynamic executor keeps a buffer for as long as
the tensor lives.  On the GPU with one, on the consumer's stream (at 6 MB a batch a few microseconds): a DALI buffer is
free for DALI the moment that its tensor dies, although work that reads it may still wait in the consumer's stream.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def
from nvidia.dali import types as dali_types
from PIL import Image
from torch import Tensor

from pipeline.augment import MID_GRAY, Parameters
from pipeline.config import DataConfig
from pipeline.decode import Pixels, window_shape
from pipeline.decode.pillow import alpha_window, decode
from pipeline.errors import DataError
from pipeline.geometry import place
from pipeline.index import Dataset
from pipeline.samples import Sample, Samples

# DALI fills both modules at run time; its stubs do not cover what is used here.
fn: Any = dali_fn
types: Any = dali_types

Batch = tuple[np.ndarray, Parameters]
"""Items (N,) and what happens to each."""
Taken = tuple[Sample, Pixels | None]
"""A file and, where nc is 4, the window of its alpha."""


def _num_factors(cfg: DataConfig) -> int:
    """Brightness and contrast for gray, saturation and hue besides for colour."""
    return 2 if cfg.nc == 1 else 4


@pipeline_def
def _graph(source: Any, cfg: DataConfig, size: tuple[int, int], device: str, flip: bool, jitter: bool) -> Any:
    """The graph.  `source` yields: bytes, resize sizes, places of the cut, then what is on of alpha, flip and factors.

    Gray is made from RGB after the resize: asked for gray, DALI's PNG and CMYK readers round down (0.6 of 255 darker
    than its own JPEG reader).  Alpha comes from Pillow: decoding the channels as stored (ANY_DATA) ends DALI 2.4 with
    a segmentation fault on a gray JPEG and with an error on CMYK and on gray with alpha (all measured, 2026-11).
    """
    kinds = [(types.UINT8, 1), (types.FLOAT, 1), (types.INT32, 1)]
    kinds += [(types.UINT8, 3), (types.INT32, 1)] * (cfg.nc == 4)
    kinds += [(types.INT32, 0)] * flip + [(types.FLOAT, 0)] * (jitter * _num_factors(cfg))
    inputs = fn.external_source(
        source, num_outputs=len(kinds), batch=True, dtype=[k[0] for k in kinds], ndim=[k[1] for k in kinds]
    )
    files, resize, corner, *rest = inputs
    options = {"device": "mixed", "hw_decoder_load": cfg.hw_decoder_load} if device == "gpu" else {"device": "cpu"}
    images = fn.decoders.image(files, output_type=types.RGB, jpeg_fancy_upsampling=cfg.jpeg_fancy_upsampling, **options)
    images = fn.resize(images, size=resize, interp_type=types.INTERP_LINEAR, antialias=True)
    images = fn.slice(images, start=corner, shape=size, axes=(0, 1))
    if cfg.nc == 1:
        images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    alpha = None
    if cfg.nc == 4:
        window, random_corner, *rest = rest
        alpha = fn.slice(window.gpu() if device == "gpu" else window, start=random_corner, shape=size, axes=(0, 1))
    if flip:
        mirror, *rest = rest
        images = fn.flip(images, horizontal=mirror)
        alpha = None if alpha is None else fn.flip(fn.reshape(alpha, layout="HWC"), horizontal=mirror)
    if jitter and cfg.nc == 1:
        brightness, contrast = rest
        images = fn.brightness_contrast(images, brightness=brightness, contrast=contrast, contrast_center=MID_GRAY)
    elif jitter:
        brightness, contrast, saturation, hue = rest
        images = fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return images if alpha is None else fn.cat(images, alpha, axis=2)


class DaliDecoder:
    """Images of a dataset's items, augmented in DALI's graph; a bad file's is that of the next good one.

    Args:
        device: where the images shall be; a GPU also decodes them.
        threads: DALI's threads on the CPU.
        max_batch: images of the largest batch.
        augmented: give (H, W) images; else the windows, larger by the crop margin, with nothing done to them.
    """

    def __init__(
        self,
        cfg: DataConfig,
        source: Samples | Dataset,
        *,
        device: torch.device,
        threads: int,
        max_batch: int,
        augmented: bool = True,
    ) -> None:
        self.cfg = cfg
        self.samples = Samples.of(source)
        self._device = device
        self._shape = {"batch_size": max_batch, "num_threads": threads, "prefetch_queue_depth": cfg.prefetch}
        self._window = window_shape(cfg)[:2]
        self._size = cfg.size if augmented else self._window
        self._flip = augmented and cfg.flip
        self._jitter = augmented and any((cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue))
        self._batches: Iterator[Batch] = iter(())
        self._again: deque[Batch] = deque()
        self._in_flight: deque[Batch] = deque()
        self._pipeline = self._build(self._next_inputs, **self._shape)

    def _build(self, inputs: Callable[[], tuple[Any, ...]], **shape: int) -> Any:
        on_gpu = self._device.type == "cuda"
        number = (self._device.index or 0) if on_gpu else None
        graph = self.cfg, self._size, "gpu" if on_gpu else "cpu", self._flip, self._jitter
        return _graph(inputs, *graph, device_id=number, **shape)

    def _next_inputs(self) -> tuple[Any, ...]:
        """One batch for the graph; StopIteration ends it."""
        batch = self._again.popleft() if self._again else next(self._batches)
        self._in_flight.append(batch)
        items, params = batch
        return self._inputs([self._take(item) for item in items.tolist()], params)

    def _take(self, item: int) -> Taken:
        while True:
            sample = self.samples.read(item)
            if self.cfg.nc != 4:
                return sample, None
            try:
                return sample, alpha_window(sample.data, sample.size, sample.key, self._window)
            except DataError as error:
                self.samples.reject(sample.item, error)

    def _inputs(self, taken: list[Taken], params: Parameters) -> tuple[Any, ...]:
        spots = np.array([place(*sample.size, self._window) for sample, _ in taken])
        corner = spots[:, 2:]
        if params.top is not None and params.left is not None:
            corner = corner + np.stack([params.top, params.left], axis=1)
        files = [sample.data for sample, _ in taken]
        inputs: list[Any] = [files, spots[:, :2].astype(np.float32), corner.astype(np.int32)]
        if self.cfg.nc == 4:
            inputs.append([alpha for _, alpha in taken])
            inputs.append((corner - spots[:, 2:]).astype(np.int32))
        if self._flip:
            assert params.flip is not None
            inputs.append(params.flip.astype(np.int32))
        if self._jitter:
            assert params.factors is not None
            inputs += list(np.ascontiguousarray(params.factors.T, np.float32))[: _num_factors(self.cfg)]
        return tuple(inputs)

    def images(self, batches: Iterable[Batch]) -> Iterator[Any]:
        """DALI tensors (N, H, W, C) uint8, complete, for batches of (items, parameters), in order.

        Each is for torch.from_dlpack on the CPU, for GpuHandOver on a GPU.

        Raises:
            DataError: no file of the dataset is good any more, or DALI gives up a batch whose files it decodes.
        """
        self._batches = iter(batches)
        while True:
            try:
                output = self._pipeline.run()[0].as_tensor()  # on a GPU: when DALI's stream is done
            except StopIteration:
                return
            except RuntimeError as error:
                self._pipeline = None  # it is of no more use; its memory is free before the next one takes some
                self._reject_undecodable(error)
                self._again.extendleft(reversed(self._in_flight))
                self._in_flight.clear()
                self._pipeline = self._build(self._next_inputs, **self._shape)
                continue
            self._in_flight.popleft()
            yield output

    def _reject_undecodable(self, error: RuntimeError) -> None:
        """Look for what ended DALI's pipeline, first in the oldest batch in flight: the one whose output failed."""
        before = self.samples.num_bad
        for batch in self._in_flight:
            self._try_each(*batch)
            if self.samples.num_bad > before:
                return
        found_none = "DALI gives up a batch of files of which it decodes each by itself"
        raise DataError(f"{found_none} ({_cause(error)})") from error

    def _try_each(self, items: np.ndarray, params: Parameters) -> None:
        """Reject each file of a batch that DALI cannot decode by itself, in a graph for one image at a time.

        DALI decides and not Pillow, which knows the reason: files exist that only one of the two decodes, and what is
        replaced shall not depend on what else was in flight.  0.12 s for 128 photographs of 15 kB (2 cores, 2026-11).
        """
        waiting: list[tuple[Any, ...]] = []
        alone: Any = None
        tried: set[int] = set()
        for row, item in enumerate(items.tolist()):
            sample, alpha = self._take(item)
            if sample.item in tried:
                continue
            tried.add(sample.item)
            its = _row(params, row)
            if alone is None:
                alone = self._build(lambda: waiting.pop(), batch_size=1, num_threads=1, prefetch_queue_depth=1)
                waiting.append(self._inputs([self._sound()], its))
                alone.run()  # where this fails it is not the files' fault, and its error is the one to see
            waiting.append(self._inputs([(sample, alpha)], its))
            try:
                alone.run()[0].as_tensor()
            except RuntimeError as error:
                alone = None
                self.samples.reject(sample.item, self._reason(sample, error))

    def _sound(self) -> Taken:
        """A picture that DALI decodes wherever it works."""
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        opaque = np.full((*self._window, 1), 255, np.uint8) if self.cfg.nc == 4 else None
        return Sample(-1, np.frombuffer(buffer.getvalue(), np.uint8), (16, 16), ""), opaque

    def _reason(self, sample: Sample, error: RuntimeError) -> str | DataError:
        try:
            decode(sample.data, sample.size, self._window, self.cfg.nc, sample.key)
        except DataError as found:
            return found
        return f"cannot be decoded by DALI ({_cause(error)})"

    def close(self) -> None:
        """End DALI's threads and free its buffers; tensors handed over stay valid."""
        self._pipeline = None
        self._batches = iter(())


def _row(params: Parameters, row: int) -> Parameters:
    """What happens to one image of a batch."""
    return Parameters(*(None if part is None else part[row : row + 1] for part in vars(params).values()))


def _cause(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened; before it come the operator and where it stands."""
    lines = str(error).rpartition("encountered:")[2].strip().splitlines()
    return lines[0].rstrip(" :") if lines else "no reason given"


class GpuHandOver:
    """DALI's tensors on the GPU to torch's: a copy on the current stream, the original kept until it is made."""

    def __init__(self) -> None:
        self._copied: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __call__(self, output: Any) -> Tensor:
        while self._copied and self._copied[0][0].query():
            self._copied.popleft()
        batch = torch.from_dlpack(output).clone()
        copied = torch.cuda.Event()
        copied.record()
        self._copied.append((copied, output))
        return batch
