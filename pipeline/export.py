"""A run's generator as files that need nothing of this project: safetensors, torch.export's .pt2, ONNX.

At inference BatchNorm is one scale and one shift a channel.  Both go into the transposed convolution before it, with
statistics measured for these very weights (pipeline.sampling.recalibrated); what is left is transposed convolutions
with a bias, ReLU, and tanh at the end.

    FOLDER/
        model.safetensors   the folded weights
        model.pt2           latents in, images out, as torch.export has it
        model.onnx          the same as ONNX
        config.json         architecture and sizes, enough to use the weights; sums of the files
        README.md           model card
        sample.png          64 pictures

Every file is read again and held against the generator it came from, before the folder gets its name.
Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline import export_onnx
from pipeline.checkpoint import Checkpoint, open_generator
from pipeline.config import ConfigError
from pipeline.errors import Diverged, UserError
from pipeline.files import folder_written_aside
from pipeline.model_card import write_card
from pipeline.philox import Stream
from pipeline.pictures import grid, save_png, to_uint8
from pipeline.sampling import generate, latents, recalibrated

Format = Literal["safetensors", "torch", "onnx"]
Output = Literal["uint8", "float"]
Draw = Callable[[Tensor], Tensor]

FILES: dict[Format, str] = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}
CONFIG, CARD, SAMPLE = "config.json", "README.md", "sample.png"
BATCHES = (1, 3, 17)
"""Latents at a time with which a file is tried: the batch is free, and 1 is where an export likes to fix it."""
LARGEST_DIFFERENCE = 1e-4
"""Of [-1, 1], between a file's pictures and the generator's; a gray level is 78 times that.  Rounding in float32 makes
2e-6 at the reference size, one wrong weight far more."""
LARGEST_SHARE = 2 * LARGEST_DIFFERENCE * 127.5
"""Of the uint8 values, that may lie one gray level beside the generator's: those so near the middle between two."""


def folded(generator: nn.Module) -> nn.Sequential:
    """The same network without BatchNorm: ConvTranspose2d, ReLU, ConvTranspose2d, ReLU, ... ConvTranspose2d, Tanh.

    With w the weight, and g, b, m, v BatchNorm's scale, shift, mean and variance of an output channel, the folded
    weight is w g / sqrt(v + eps) and the bias b - m g / sqrt(v + eps); computed in float64 and rounded once.

    Args:
        generator: as `recalibrated` gives it; stays as it is.
    """
    assert isinstance(generator.layers, nn.Sequential)
    layers: list[nn.Module] = []
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            before = layers[-1]
            assert isinstance(before, nn.ConvTranspose2d)
            layers[-1] = fuse_conv_bn_eval(before, copy.deepcopy(layer).double(), transpose=True)
        else:
            layers.append(copy.deepcopy(layer).double())
    return nn.Sequential(*layers, nn.Tanh()).float().eval().requires_grad_(False)


class InferenceGenerator(nn.Module):
    """Latents in, images out: (N, nz) float32 -> (N, H, W, C) uint8, or (N, C, H, W) float32 in [-1, 1]."""

    def __init__(self, layers: nn.Sequential, output: Output) -> None:
        super().__init__()
        self.layers = layers
        self.output = output

    def forward(self, latents: Tensor) -> Tensor:
        images = self.layers(latents[:, :, None, None])
        return to_uint8(images) if self.output == "uint8" else images


def described(layers: nn.Sequential) -> list[dict[str, Any]]:
    """What config.json says of the layers: a transposed convolution each, with the activation behind it."""
    found = []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.ConvTranspose2d):
            found.append(
                {
                    "weight": f"layers.{i}.weight",
                    "bias": f"layers.{i}.bias" if layer.bias is not None else None,
                    "in_channels": layer.in_channels,
                    "out_channels": layer.out_channels,
                    "kernel_size": list(layer.kernel_size),
                    "stride": layer.stride[0],
                    "padding": int(layer.padding[0]),
                    "activation": "tanh" if isinstance(layers[i + 1], nn.Tanh) else "relu",
                }
            )
    return found


def drawn_with(weights: dict[str, Tensor], config: dict[str, Any], z: Tensor) -> Tensor:
    """Pictures from nothing but a safetensors file and config.json: (N, nz) float32 -> (N, C, H, W) in [-1, 1]."""
    x = z[:, :, None, None]
    for layer in config["layers"]:
        bias = weights[layer["bias"]] if layer["bias"] else None
        x = F.conv_transpose2d(x, weights[layer["weight"]], bias, layer["stride"], layer["padding"])
        x = torch.tanh(x) if layer["activation"] == "tanh" else torch.relu(x)
    return x


def to_torch_export(model: InferenceGenerator, nz: int) -> bytes:
    """A .pt2 file with a free batch; it says nothing of where on this machine the code lay."""
    program = torch.export.export(model, (torch.zeros(2, nz),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _to_safetensors(layers: nn.Sequential) -> bytes:
    import safetensors.torch

    weights = {f"layers.{name}": value.contiguous() for name, value in layers.state_dict().items()}
    return safetensors.torch.save(weights, {"format": "pt"})


def opened(kind: Format, folder: Path, config: dict[str, Any]) -> Draw:
    """A file of an export as somebody else would open it: latents (N, nz) on the CPU in, images out."""
    path = folder / FILES[kind]
    if kind == "safetensors":
        import safetensors.torch

        weights = safetensors.torch.load_file(path)
        return lambda z: drawn_with(weights, config, z)
    if kind == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.11 warns of its own way of reading weights
            module = torch.export.load(path).module()
        return lambda z: module(z)
    return export_onnx.opened(path)


@dataclass(frozen=True)
class Difference:
    """Between pictures from a file and those of the generator."""

    largest: float
    """Of [-1, 1] or, where the file gives uint8, of 255."""
    share: float
    """Of the values, that differ."""
    uint8: bool

    @property
    def harmless(self) -> bool:
        """What rounding in float32 explains; False for NaN."""
        if self.uint8:
            return self.largest <= 1 and self.share <= LARGEST_SHARE
        return self.largest <= LARGEST_DIFFERENCE

    def __str__(self) -> str:
        if self.uint8 and not self.largest:
            return "no value of 255 differs"
        if self.uint8:
            return f"largest difference {self.largest:.0f} of 255, in {self.share:.4%} of the values"
        return f"largest difference {self.largest:.1e} of [-1, 1]"


@torch.no_grad()
def compared(draw: Draw, expected: Tensor, z: Tensor) -> Difference:
    """How far a file's pictures lie from the generator's, over all of BATCHES.

    Args:
        draw: gives (N, H, W, C) uint8 or (N, C, H, W) float32.
        expected: (N, C, H, W) float32, the generator's; N the largest of BATCHES.
        z: (N, nz) float32, its latents.
    """
    largest, differing, values, uint8 = 0.0, 0, 0, False
    for batch in BATCHES:
        images, wanted = draw(z[:batch]), expected[:batch]
        uint8 = images.dtype == torch.uint8
        wanted = to_uint8(wanted) if uint8 else wanted
        if images.shape != wanted.shape:
            raise UserError(f"images of {tuple(wanted.shape)} were to come, got {tuple(images.shape)}")
        distance = (images.float() - wanted.float()).abs()
        largest = max(largest, float(distance.max().nan_to_num(torch.inf)))
        differing += int((distance > 0).sum())
        values += distance.numel()
    return Difference(largest, differing / values, uint8)


def missing_packages(kind: Format) -> str:
    """The first package that a format needs and that cannot be imported here; empty: none is missing."""
    needed = {"safetensors": ("safetensors",), "torch": (), "onnx": export_onnx.PACKAGES}[kind]
    for name in needed:
        try:
            __import__(name)
        except ImportError:
            return name
    return ""


def check_target(folder: Path, *, overwrite: bool) -> None:
    """
    Raises:
        ConfigError: something is there that must not be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--out must be a folder, got the file {folder}")
    found = {path.name for path in folder.iterdir()}
    ours = {*FILES.values(), CONFIG, CARD, SAMPLE}
    if found and not overwrite:
        raise ConfigError(f"--out must be a new or empty folder, or with --overwrite an older export, got {folder}")
    if found - ours:
        raise ConfigError(f"--overwrite replaces an export only, and {folder} holds other things: {min(found - ours)}")


@torch.no_grad()
def export(
    checkpoint: Checkpoint,
    folder: Path,
    formats: Sequence[Format],
    *,
    weights: Literal["ema", "live"] = "ema",
    output: Output = "uint8",
    say: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint's generator into a folder, each file checked before the folder is there.

    Args:
        folder: replaced where there is one; `check_target` says whether it may be.
        weights: G's average, or the weights as training left them.
        output: what model.pt2 and model.onnx give.
        say: told a line a file.

    Raises:
        Diverged: the weights are not finite.
        StorageError: the checkpoint cannot be read, or the folder not be written.
        UserError: a file does not draw what the generator draws.
    """
    loaded, cfg, _ = open_generator(checkpoint.folder, weights=weights)
    if not all(bool(p.isfinite().all()) for p in loaded.parameters()):
        raise Diverged(f"{checkpoint.folder}: the generator's weights are not finite")
    if not cfg.optim.ema_half_life_images:
        weights = "live"  # of a run without an average these are all there is
    nz = cfg.model.nz
    generator = recalibrated(loaded, nz)
    layers = folded(generator)
    model = InferenceGenerator(layers, output).eval()
    height, width = cfg.data.size
    config: dict[str, Any] = {
        "model_type": "dcgan-generator",
        "nz": nz,
        "image_size": [height, width],
        "channels": cfg.data.nc,
        "input": {"name": "latents", "shape": ["batch", nz], "dtype": "float32", "distribution": "standard normal"},
        "output": {
            "uint8": {"shape": ["batch", height, width, cfg.data.nc], "dtype": "uint8", "range": [0, 255]},
            "float": {"shape": ["batch", cfg.data.nc, height, width], "dtype": "float32", "range": [-1, 1]},
        }[output],
        "layers": described(layers),
        "weights": weights,
        "images_seen": checkpoint.images_seen,
        "files": {},
    }
    contents: dict[Format, Callable[[], bytes]] = {
        "safetensors": lambda: _to_safetensors(layers),
        "torch": lambda: to_torch_export(model, nz),
        "onnx": lambda: export_onnx.to_onnx(model, nz),
    }
    z = latents(0, Stream.SAMPLE_LATENT, 0, max(BATCHES), nz)
    expected = generator(z)
    with folder_written_aside(folder) as aside:
        for kind in dict.fromkeys(formats):
            data = contents[kind]()
            (aside / FILES[kind]).write_bytes(data)
            found = compared(opened(kind, aside, config), expected, z)
            if not found.harmless:
                raise UserError(f"{FILES[kind]} does not draw the generator's pictures: {found}; nothing was kept")
            config["files"][FILES[kind]] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            sizes = ", ".join(map(str, BATCHES[:-1])) + f" and {BATCHES[-1]}"
            say(f"{FILES[kind]}  {len(data) / 2**20:.1f} MiB  checked: read again, batches of {sizes}: {found}")
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_png(grid(generate(generator, latents(0, Stream.SAMPLE_LATENT, 0, 64, nz))), aside / SAMPLE)
        write_card(aside / CARD, checkpoint, cfg, config)
