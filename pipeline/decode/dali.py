"""The fast decoder: NVIDIA DALI in pipeline mode, one graph for the GPU and the CPU.

    file bytes -> decode (GPU: `mixed`, else the CPU) -> resize -> crop -> mirror -> colour -> uint8 (N, H, W, C)

The graph holds no chance and no files: a callback hands it each batch's bytes together with the sizes, places and
colour factors of every image.  The callback runs in the thread that asks for batches, DALI's own threads do the rest.

Outputs are handed over by DLPack.  On the CPU without a copy: DALI's dynamic executor keeps a buffer for as long as
the tensor lives.  On the GPU with one, on the consumer's stream (at 6 MB a batch a few microseconds): a DALI buffer is
free for DALI the moment that its tensor dies, although work that reads it may still wait in the consumer's stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def
from nvidia.dali import types as dali_types
from torch import Tensor

from pipeline.augment import MID_GRAY, Parameters
from pipeline.config import DataConfig
from pipeline.decode import window_shape
from pipeline.decode.pillow import alpha_window, decode
from pipeline.errors import DataError
from pipeline.geometry import place
from pipeline.index import Dataset
from pipeline.sources import one_line

# DALI fills both modules at run time; its stubs do not cover what is used here.
fn: Any = dali_fn
types: Any = dali_types


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
    """Images of a dataset's items, augmented in DALI's graph.

    Args:
        device: where the images shall be; a GPU also decodes them.
        threads: DALI's threads on the CPU.
        max_batch: images of the largest batch.
        augmented: give (H, W) images; else the windows, larger by the crop margin, with nothing done to them.
    """

    def __init__(
        self,
        cfg: DataConfig,
        dataset: Dataset,
        *,
        device: torch.device,
        threads: int,
        max_batch: int,
        augmented: bool = True,
    ) -> None:
        self.cfg = cfg
        self.dataset = dataset
        self._window = window_shape(cfg)[:2]
        self._flip = augmented and cfg.flip
        self._jitter = augmented and any((cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue))
        self._batches: Iterator[tuple[np.ndarray, Parameters]] = iter(())
        self._in_flight: deque[np.ndarray] = deque()
        on_gpu = device.type == "cuda"
        self._pipeline: Any = _graph(
            self._next_inputs,
            cfg,
            cfg.size if augmented else self._window,
            "gpu" if on_gpu else "cpu",
            self._flip,
            self._jitter,
            batch_size=max_batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=cfg.prefetch,
        )

    def _next_inputs(self) -> tuple[Any, ...]:
        """One batch for the graph; StopIteration ends it."""
        items, params = next(self._batches)
        self._in_flight.append(items)
        files = [self.dataset.read(item) for item in items.tolist()]
        spots = np.array([place(*self.dataset.size(item), self._window) for item in items.tolist()])
        corner = spots[:, 2:]
        if params.top is not None and params.left is not None:
            corner = corner + np.stack([params.top, params.left], axis=1)
        inputs: list[Any] = [files, spots[:, :2].astype(np.float32), corner.astype(np.int32)]
        if self.cfg.nc == 4:
            names = [self.dataset.key(item) for item in items.tolist()]
            sizes = [self.dataset.size(item) for item in items.tolist()]
            inputs.append([alpha_window(*each, self._window) for each in zip(files, sizes, names, strict=True)])
            inputs.append((corner - spots[:, 2:]).astype(np.int32))
        if self._flip:
            assert params.flip is not None
            inputs.append(params.flip.astype(np.int32))
        if self._jitter:
            assert params.factors is not None
            inputs += list(np.ascontiguousarray(params.factors.T, np.float32))[: _num_factors(self.cfg)]
        return tuple(inputs)

    def images(self, batches: Iterable[tuple[np.ndarray, Parameters]]) -> Iterator[Any]:
        """DALI tensors (N, H, W, C) uint8, complete, for batches of (items, parameters), in order.

        Each is for torch.from_dlpack on the CPU, for GpuHandOver on a GPU.

        Raises:
            DataError: a file cannot be read or decoded; names the file.
        """
        self._batches = iter(batches)
        while True:
            try:
                output = self._pipeline.run()[0].as_tensor()  # on a GPU: when DALI's stream is done
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._named(error) from error
            self._in_flight.popleft()
            yield output

    def _named(self, error: RuntimeError) -> DataError:
        """The error with its file: DALI does not say which, so Pillow tries those in flight one by one."""
        for items in self._in_flight:
            for item in items.tolist():
                data, size, name = self.dataset.read(item), self.dataset.size(item), self.dataset.key(item)
                try:
                    decode(data, size, self._window, self.cfg.nc, name)
                except DataError as found:
                    return found
        return DataError(f"DALI cannot decode a batch of files that Pillow can decode ({one_line(error)})")

    def close(self) -> None:
        """End DALI's threads and free its buffers; tensors handed over stay valid."""
        self._pipeline = None
        self._batches = iter(())


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
