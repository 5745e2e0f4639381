"""Learning rates over a run, as a function of the images seen: resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """How both learning rates fall: whole until a share of the run is done, then to 0 at its end.

    linear: as in Zhu et al. 2017 (CycleGAN).  cosine: half a wave, Loshchilov and Hutter 2017 (SGDR), equation 5,
    without restarts.
    """

    kind: Literal["none", "linear", "cosine"] = "none"
    start: float = 0.5
    """Share of the run after which they fall.  At least 0, below 1."""
    total_images: int = 0
    """Of the whole run."""

    def factor(self, images_seen: int) -> float:
        """What the learning rates are multiplied by in the step that begins after images_seen images: 1 down to 0."""
        done = images_seen / self.total_images if self.total_images else 0.0
        fallen = min(1.0, max(0.0, (done - self.start) / (1 - self.start)))
        if self.kind == "linear":
            return 1.0 - fallen
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * fallen))
        return 1.0
