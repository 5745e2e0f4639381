"""ONNX: one file with a free batch, checked by onnx, run by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_BYTES = (1 << 31) - (1 << 20)
"""A protobuf message ends at 2 GiB; some room for what is no weight."""


def to_onnx(model: nn.Module, nz: int) -> bytes:
    """A model as ONNX with input `latents` (batch, nz) and output `images`.

    The newest operators that this torch writes by itself.  Where on this machine the code lay is taken out again.

    Raises:
        ConfigError: the weights do not fit into one file.
    """
    import onnx

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGEST_BYTES:
        raise ConfigError(
            f"--format onnx takes weights of at most 2 GiB in one file, this generator has {size:,} bytes"
        )
    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, nz),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["latents"],
            output_names=["images"],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString()
    return data


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file under onnxruntime on the CPU: latents (N, nz) float32 in, images out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda z: torch.from_numpy(session.run(None, {"latents": z.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the exporter's progress and of torch's own deprecations; its errors are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
