"""The model card of an export: what it is, learnt from what, how long, how good, for what.

A README.md with the front matter that Hugging Face reads.  It names the dataset, never where it lay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint import Checkpoint
from pipeline.config import METRICS, Config, to_dict
from pipeline.files import read_objects

CODE_LICENCE = "Apache-2.0"
_ALWAYS = (
    "data.image_size",
    "data.nc",
    "model.nz",
    "model.ngf",
    "model.ndf",
    "train.batch_size",
    "optim.lr",
    "optim.beta1",
    "optim.beta2",
    "optim.ema_half_life_images",
    "loss.kind",
    "run.seed",
)
"""Settings that the card names whatever they are; of these sections the others where they are not the default."""
_SECTIONS = ("data", "model", "optim", "loss", "d_input")
_UNTOLD = ("dataroot", "workers", "prefetch", "cache", "cache_dir", "decoder", "max_pixels", "hw_decoder_load")
_USE = {
    "model.pt2": """\
```python
import torch

draw = torch.export.load("model.pt2").module()
with torch.inference_mode():
    images = draw(torch.randn(16, {nz}))  # {shape}
```""",
    "model.onnx": """\
```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
latents = numpy.random.default_rng(0).standard_normal((16, {nz}), numpy.float32)
(images,) = session.run(None, {{"latents": latents}})  # {shape}
```""",
    "model.safetensors": """\
```python
import json

import torch
from safetensors.torch import load_file

config, weights = json.load(open("config.json")), load_file("model.safetensors")
with torch.inference_mode():
    images = torch.randn(16, config["nz"])[:, :, None, None]
    for layer in config["layers"]:
        weight, bias = weights[layer["weight"]], weights.get(layer["bias"])
        images = torch.nn.functional.conv_transpose2d(images, weight, bias, layer["stride"], layer["padding"])
        images = images.tanh() if layer["activation"] == "tanh" else images.relu()
# images: (16, {channels}, {height}, {width}) float32 in [-1, 1]
```""",
}


@dataclass(frozen=True)
class Measured:
    """A metric's value for these weights, and what makes it comparable."""

    metric: str
    value: float
    num_images: int
    crop: str
    resize: str
    extractor: str
    """The network that it looks through; a dash where there is none."""

    @property
    def better(self) -> str:
        return METRICS[self.metric]


def write_card(path: Path, checkpoint: Checkpoint, cfg: Config, exported: dict[str, Any]) -> None:
    """Write README.md.

    Args:
        checkpoint: where the weights come from; its run's metrics are looked for beside it.
        cfg: its settings.
        exported: what config.json says.
    """
    run = run_of(checkpoint)
    measured = measurements(checkpoint, cfg, exported["weights"])
    name = _plain(run.name if run else checkpoint.folder.name)
    text = (
        f"---\n{_front_matter(name, cfg, exported, measured)}---\n\n{_body(name, checkpoint, cfg, exported, measured)}"
    )
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The run's folder; None for a checkpoint that was taken out of it."""
    folder = checkpoint.folder.resolve()
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def measurements(checkpoint: Checkpoint, cfg: Config, weights: str) -> list[Measured]:
    """What metrics.jsonl and evaluations.jsonl of the run say of these very weights; of each metric the newest."""
    run, found = run_of(checkpoint), {}
    if run is None:
        return []
    averaged = weights == "ema" or not cfg.optim.ema_half_life_images
    while_training = read_objects(run / "metrics.jsonl") if averaged else []
    rows = [row for row in while_training if row.get("images_seen") == checkpoint.images_seen]
    own = str(checkpoint.manifest.get("identity", {}).get("dataset", ""))[:12]
    for row in read_objects(run / "evaluations.jsonl"):
        of_these = row.get("checkpoint") == checkpoint.folder.name and row.get("weights") == weights
        if of_these and own in row.get("real", own):  # not those that were held against other photographs
            rows.append(row)
    for row in rows:
        for metric in METRICS:
            if isinstance(row.get(metric), int | float):
                crop = str(row.get("crop", "the training crop"))
                resize = str(row.get("resize", "as in training"))
                found[metric] = Measured(
                    metric, row[metric], int(row.get("num_images", 0)), crop, resize, row.get("extractor") or "-"
                )
    return [found[metric] for metric in METRICS if metric in found]


def num_photographs(checkpoint: Checkpoint) -> int | None:
    """Photographs an epoch, from the run's statistics; None where there are none."""
    run = run_of(checkpoint)
    for row in read_objects(run / "stats.jsonl") if run else ():
        if isinstance(row.get("epoch"), float) and row["epoch"] > 0:
            return round(row["images_seen"] / row["epoch"])
    return None


def _plain(name: str) -> str:
    """A name that neither ends a line nor a cell of a table, and is no markup."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)


def dataset_name(cfg: Config) -> str:
    """The last part of data.dataroot; of a pattern such as a/*.tar, that and the folder before it."""
    path = Path(cfg.data.dataroot)
    parts = path.parts[-2:] if any(c in path.name for c in "*?[") else (path.name,)
    return "/".join(parts) or "unnamed"


def _front_matter(name: str, cfg: Config, exported: dict[str, Any], measured: Sequence[Measured]) -> str:
    tags = ["dcgan", "gan", "pytorch", *(f.removeprefix("model.") for f in exported["files"] if f != "model.pt2")]
    front: dict[str, Any] = {
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags,
        "license": "other",
        "license_name": "depends-on-the-training-photographs",
        "license_link": "README.md",
    }
    if measured:
        result = {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"name": dataset_name(cfg), "type": "images"},
            "metrics": [
                {"type": m.metric, "name": f"{m.metric} on {m.num_images} images", "value": m.value} for m in measured
            ],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return text


def _settings(cfg: Config) -> list[tuple[str, Any]]:
    mine, default = to_dict(cfg), to_dict(Config())
    keys = [f"{section}.{name}" for section in _SECTIONS for name in mine[section] if name not in _UNTOLD]
    told = []
    for key in [*keys, *(k for k in _ALWAYS if k not in keys)]:
        section, _, name = key.partition(".")
        value, usual = mine[section][name], default[section][name]
        if key in _ALWAYS or value != usual:
            told.append((key, value))
    return told


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _body(
    name: str, checkpoint: Checkpoint, cfg: Config, exported: dict[str, Any], measured: Sequence[Measured]
) -> str:
    manifest = checkpoint.manifest
    height, width = cfg.data.size
    channels = {1: "gray", 3: "RGB", 4: "RGBA"}[cfg.data.nc]
    photographs = num_photographs(checkpoint)
    output = exported["output"]
    shape = "(16, " + ", ".join(str(n) for n in output["shape"][1:]) + f") {output['dtype']}"
    numbers = {"nz": cfg.model.nz, "channels": cfg.data.nc, "height": height, "width": width, "shape": shape}
    use = "\n\n".join(f"`{file}`:\n\n{_USE[file].format_map(numbers)}" for file in exported["files"])
    of_weights = "averaged over training (EMA)" if exported["weights"] == "ema" else "as training left them"
    data = [
        ("name", _plain(dataset_name(cfg))),
        ("photographs", f"{photographs:,}" if photographs else "not recorded with this checkpoint"),
        ("fingerprint", f"`{manifest.get('identity', {}).get('dataset', 'not recorded')}`"),
        ("preparation", f"short side resized (linear, antialias) to the crop, {height} x {width} cut from it, [-1, 1]"),
    ]
    training = [
        ("images seen", f"{checkpoint.images_seen:,}"),
        ("steps", f"{manifest['step']:,}" if "step" in manifest else "not recorded"),
        ("epochs", f"{checkpoint.images_seen / photographs:.1f}" if photographs else "not recorded"),
        ("torch", manifest.get("versions", {}).get("torch", "not recorded")),
        ("precision", manifest.get("layout", {}).get("precision", "not recorded")),
        *((f"`{key}`", f"`{value}`") for key, value in _settings(cfg)),
    ]
    quality = "Not measured: the run holds no evaluation of these weights."
    if measured:
        rows = [
            (m.metric, f"{m.value:.4g}", m.better, f"{m.num_images:,}", m.crop, m.resize, m.extractor) for m in measured
        ]
        quality = _table(("metric", "value", "better", "images", "crop", "resize", "extractor"), rows)
        quality += "\n\nSuch figures compare only where crop, resize and number of images are the same."
    return f"""\
# {name}

A DCGAN generator (Radford, Metz, Chintala 2016): a latent vector of {cfg.model.nz} standard normal numbers in, a
picture of {height} x {width} pixels ({channels}) out. Its weights are those {of_weights}; BatchNorm is folded into the
transposed convolutions, with statistics measured for these weights.

![64 pictures that it draws](sample.png)

## Use

{use}

## Data

{_table(("", ""), data)}

## Training

{_table(("", ""), training)}

## Quality

{quality}

## Intended use and limits

For learning, demonstrations and research on generative models. It draws what the training photographs hold, with their
bias as to who is shown and how, at {height} x {width} pixels, without any control over what comes out but the latent.
Not every picture comes out well. A picture may resemble a training photograph; that it never repeats one has not been
proven. Not for identifying people, nor for passing its pictures off as photographs of real persons.

## Licence

The code that trained and exported it is under {CODE_LICENCE}. That says nothing of these weights and of pictures drawn
with them: what may be done with both depends on the rights in the training photographs and of the people in them. Who
hands this model on states those terms here.
"""
