"""FID: how far apart two sets of features are, each taken for a Gaussian (Heusel et al. 2017, section 3).

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2)

Legend: N feature vectors of D numbers; mean m (D,), covariance S (D, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Moments:
    """Count and sums of feature vectors, in float64: what their mean and covariance are made of, on any rank."""

    count: int
    """N."""
    total: Tensor
    """(D,) float64: the sum of x."""
    outer: Tensor
    """(D, D) float64: the sum of x x^T."""

    @classmethod
    def empty(cls, dimension: int, device: torch.device | str = "cpu") -> Moments:
        """Those of no vectors."""
        zeros = torch.zeros(dimension + 1, dimension, dtype=torch.float64, device=device)
        return cls(0, zeros[0], zeros[1:])

    def add(self, features: Tensor) -> None:
        """Take in (N, D) vectors of any float dtype, on the moments' device; N may be 0."""
        exact = features.double()
        self.count += len(exact)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)

    def over_ranks(self) -> Moments:
        """Those of all ranks' vectors together, equal on all of them; collective, and this one stays as it is."""
        count = self.total.new_tensor([self.count])
        sums = torch.cat([count, self.total, self.outer.flatten()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        dimension = len(self.total)
        return Moments(int(sums[0]), sums[1 : 1 + dimension], sums[1 + dimension :].view(dimension, dimension))

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, over N - 1; N at least 2."""
        assert self.count >= 2, self.count
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)


def distance(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of the two Gaussians, which is what FID means; at least 0.

    With S = F F^T the trace of (S1 S2)^1/2 is the sum of the singular values of F1^T F2.  So no root is taken of a
    product's eigenvalues, where with fewer vectors than numbers in one all but a few are rounding, and the root of
    1e-16 is 1e-8.
    """
    covariances = one.covariance, other.covariance
    spread = sum(covariance.trace() for covariance in covariances)
    first, second = (_factor(covariance) for covariance in covariances)
    shared = torch.linalg.svdvals(first.T @ second).sum()
    apart = (one.mean - other.mean).square().sum()
    return max(0.0, float(apart + spread - 2 * shared))


def _factor(covariance: Tensor) -> Tensor:
    """(D, R) F with F F^T = the covariance, where R is its rank as far as rounding lets it be told."""
    values, vectors = torch.linalg.eigh(covariance)  # in rising order
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()
