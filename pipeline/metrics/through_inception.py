"""What Inception's features say of a generator: the metrics of pipeline.config.INCEPTION_METRICS, over all ranks.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.distributed import Ranks
from pipeline.metrics.frechet import Moments, distance
from pipeline.metrics.gathering import CHUNK, gathered
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kernel_distance import kid
from pipeline.metrics.manifold import precision_recall_density_coverage
from pipeline.metrics.real_side import Arrays, RealSide
from pipeline.metrics.swd import Images

MANIFOLD = ("precision", "recall", "density", "coverage")
FEATURES, LOGITS = 2048, 1008
LEAST_IMAGES = {"inception_score": 10} | dict.fromkeys(MANIFOLD, 6)
"""Parts of the score, and one more than the neighbours that are looked for; of the others two do."""


class Extractor(Protocol):
    """pipeline.metrics.inception.InceptionFeatures, or what stands in for it in a test."""

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class Seen:
    """A set of images as Inception sees it, the same on every rank; what no metric asks for is None."""

    moments: Moments | None
    features: Tensor | None
    """(N, 2048) float32, on the ranks' device."""
    logits: Tensor | None
    """(N, 1008) float32, on the ranks' device."""


class InceptionMetrics:
    """Some of these metrics, against one real side."""

    def __init__(self, extractor: Extractor, real: RealSide, ranks: Ranks, metrics: Sequence[str]) -> None:
        self._extractor, self._real, self._ranks = extractor, real, ranks
        self.metrics = metrics
        self._needs_moments = "fid" in metrics
        self._needs_features = "kid" in metrics or any(name in metrics for name in MANIFOLD)
        self._needs_logits = "inception_score" in metrics
        self._known: Seen | None = None

    def measure(self, fakes: Images) -> dict[str, float]:
        """The figures of generated images, as many as there are real ones; collective.

        All ranks work out the same from the same features: none waits while one does.
        """
        real = self._real_side()
        fake = self._see(fakes, logits=self._needs_logits)
        found: dict[str, float] = {}
        if self._needs_moments:
            assert fake.moments is not None
            assert real.moments is not None
            found["fid"] = distance(real.moments, fake.moments)
        if "kid" in self.metrics:
            assert fake.features is not None
            assert real.features is not None
            found["kid"], found["kid_std"] = kid(real.features, fake.features)
        if fake.logits is not None:
            found["inception_score"], found["inception_score_std"] = inception_score(fake.logits)
        if any(name in self.metrics for name in MANIFOLD):
            assert fake.features is not None
            assert real.features is not None
            four = precision_recall_density_coverage(real.features, fake.features)
            found |= {name: value for name, value in four.items() if name in self.metrics}
        return found

    def _see(self, images: Images, *, logits: bool) -> Seen:
        """Every rank looks at its chunks: moments are added up, the rest is gathered."""
        device, count = self._ranks.device, self._real.num_images
        moments = Moments.empty(FEATURES, device) if self._needs_moments else None
        columns = FEATURES * self._needs_features + LOGITS * logits

        def look(share: range) -> Tensor:
            pixels = torch.from_numpy(images(share.start, share.stop))
            features, scores = self._extractor(pixels)
            features, scores = features.to(device), scores.to(device)
            if moments is not None:
                moments.add(features)
            kept = [features] * self._needs_features + [scores] * logits
            return torch.cat(kept, 1) if kept else features[:, :0]

        like = torch.empty((0, columns), device=device)
        whole = gathered(look, count, self._ranks, like, chunk=CHUNK).to(device)
        return Seen(
            moments.over_ranks() if moments is not None else None,
            whole[:, :FEATURES].contiguous() if self._needs_features else None,
            whole[:, columns - LOGITS :].contiguous() if logits else None,
        )

    def _real_side(self) -> Seen:
        if self._known is None and (self._needs_moments or self._needs_features):
            found = self._real.shared(
                "inception",
                self._build_real_side,
                extractor=self._extractor.name,
                moments=self._needs_moments,
                features=self._needs_features,
            )
            device = self._ranks.device
            arrays = {name: torch.from_numpy(array).to(device) for name, array in found.items()}
            moments = None
            if self._needs_moments:
                moments = Moments(int(arrays["count"]), arrays["total"], arrays["outer"])
            self._known = Seen(moments, arrays.get("features"), None)
        return self._known or Seen(None, None, None)

    def _build_real_side(self) -> Arrays:
        self._real.open()
        seen = self._see(self._real.images, logits=False)
        found: dict[str, Tensor] = {}
        if seen.moments is not None:
            moments = seen.moments
            found |= {"count": torch.tensor(moments.count), "total": moments.total, "outer": moments.outer}
        if seen.features is not None:
            found["features"] = seen.features
        return {name: value.cpu().numpy() for name, value in found.items()}
