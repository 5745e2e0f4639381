"""What the Inception network sees in a picture: the features of FID, KID, precision and recall, and Inception's logits.

The network is the original FID's (Heusel et al. 2017): TensorFlow's Inception v3 graph of 2015-12-05, as torch-fidelity
ported it.  torchvision's Inception v3 has other weights and another pooling; its figures cannot be compared.

Legend: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.errors import DataError
from pipeline.precision import full_float32

DEFAULT_NAME = "inception-2015-12-05.pth"
"""The weights' file in the cache folder, where eval.inception_weights names no other."""

SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""Where the file comes from; nothing is fetched."""

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file of 95,628,359 bytes.  Its published name bears the first 8 digits; all 64 are those that
snap-research/discoscene pins (models/inception_model.py) for pytorch-fid's pt_inception-2015-12-05-6726825d.pth, which
is the same file."""

_BATCH = 64  # images at a time: their activations take about 0.4 GB


class InceptionFeatures:
    """Inception's view of images, in full float32: the same for the same batch, whatever training has set."""

    name: str
    """Network and weights, for the key of whatever is kept of its features."""

    def __init__(self, weights: Path, device: torch.device, *, sha256: str = SHA256) -> None:
        """The network on a device.

        Args:
            weights: the file SOURCE, under any name.
            device: where features are computed.
            sha256: what the file must hash to, checked before any of it is loaded.

        Raises:
            ConfigError: torch-fidelity is not installed.
            DataError: no such file, one that cannot be read, or another file.
        """
        network = _network_class()
        # torch-fidelity unpickles whatever file it is given, code included.  It gets what has been read without.
        buffer = io.BytesIO()
        torch.save(_read(weights, sha256), buffer)
        buffer.seek(0)
        self.name = f"inception-2015-12-05-{sha256}"
        self._network: nn.Module = network(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        ).to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images.

        The network's first step resizes to 299 x 299 as TensorFlow 1 did: bilinear, pixel i at i * H / 299, no
        antialiasing, so that a large image is not blurred first (torch-fidelity's resize, which is the original's).

        Args:
            images: (N, H, W, 3) uint8, on any device.

        Returns:
            (N, 2048) float32, the mean over the last layer's 8 x 8 places, at least 0; and (N, 1008) float32, the
            logits without their bias, as the original Inception Score takes them.  On the network's device.
        """
        assert images.dtype == torch.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[3] == 3, images.shape
        parts = []
        with torch.autocast(self._device.type, enabled=False), full_float32():
            for part in images.split(_BATCH):
                parts.append(self._network(part.to(self._device).permute(0, 3, 1, 2)))
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(logits)


def _network_class() -> type[Any]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            f"eval.metrics has some that look through Inception, and a package for it is missing ({error.name}):"
            " pip install -e '.[metrics]'"
        ) from error
    found: type[Any] = FeatureExtractorInceptionV3
    return found


def _read(weights: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of the file, once its hash is the expected one."""
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise DataError(
                    f"{weights} must be Inception's weights with SHA-256 {sha256}, got {found}; they are at {SOURCE}"
                )
            file.seek(0)
            state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            return state
    except FileNotFoundError as error:
        raise DataError(f"Inception's weights are missing: get {SOURCE} and put it at {weights}") from error
    except OSError as error:
        raise DataError(f"cannot read Inception's weights at {weights}: {error.strerror or error}") from error
