"""KID: the squared maximum mean discrepancy of Inception's features (Binkowski et al. 2018, section 4).

Legend: N feature vectors of D numbers, m of them in a subset; kernel k(x, y) = (x . y / D + 1)^3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.config_error import require

LEAST_IMAGES = 2
"""Below it there is no pair of different images."""


def kid(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased estimate over random subsets.

    Unlike FID it does not grow as N shrinks; slightly below 0 for sets that are very alike.

    Args:
        real, fake: (N, D) float, on one device; their N may differ.
        subsets: how many pairs of subsets.
        subset_size: m; at most as many vectors as there are on either side.  With as many as there are on both, all
            subsets are one and the deviation is 0.
        seed: of the choice of subsets; as it stands, torch-fidelity's.

    Raises:
        ConfigError: fewer than LEAST_IMAGES of either.
    """
    size = min(subset_size, len(real), len(fake))
    require(size >= LEAST_IMAGES, "eval.num_images", f"at least {LEAST_IMAGES} for kid", size)
    # NumPy's generator, whose numbers never change, and not philox: so the subsets are torch-fidelity's.
    random = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        x = real[torch.from_numpy(random.choice(len(real), size, replace=False)).to(real.device)]
        y = fake[torch.from_numpy(random.choice(len(fake), size, replace=False)).to(fake.device)]
        estimates.append(_squared_mmd(x.double(), y.double()))
    drawn = torch.stack(estimates)
    return float(drawn.mean()), float(drawn.std(correction=0))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate from (m, D) float64 of each: pairs of a vector with itself do not count (Gretton et al.
    2012, equation 3).  In float64, because three means of about 2 leave a difference of about 0.001."""
    m = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
