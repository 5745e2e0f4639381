"""Fidelity and diversity told apart: precision and recall, density and coverage.

A set of images is taken for the balls around each of its feature vectors that reach to its k-th nearest neighbour in
the set.  Precision: the share of fake images within the real ones' balls; recall: of real ones within the fake ones'
(Kynkaanniemi et al. 2019, section 2).  Density: how many real balls a fake image lies in, over k, so that it may pass
1 and one outlier among the real images counts for little; coverage: the share of real balls with a fake image in them
(Naeem et al. 2020, section 3).

Legend: N feature vectors of D numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config_error import require

_BLOCK = 2**25  # distances at a time: 256 MiB
_COLUMNS = 4096  # vectors at a time in float64: 64 MiB at 2048 numbers


def precision_recall_density_coverage(
    real: Tensor, fake: Tensor, *, neighbours: int = 3, density_neighbours: int = 5, block: int = _BLOCK
) -> dict[str, float]:
    """All four, under these names; each from 0 to 1, but density, which has no upper bound.

    The distances are float64, so that no border depends on the precision that training runs in.

    Args:
        real, fake: (N, D) float, on one device; their N may differ.
        neighbours: k of precision and recall, as in the paper.
        density_neighbours: k of density and coverage, as in the paper.
        block: distances that are in memory at a time; at least one vector's.

    Raises:
        ConfigError: no more vectors on a side than the larger k.
    """
    most = max(neighbours, density_neighbours)
    least = min(len(real), len(fake))
    require(least > most, "eval.num_images", f"above {most} for precision, recall, density and coverage", least)
    # Columns of the k-th neighbour's squared distance, k from 1.
    around_real, around_fake = (_nearest(features, most, block) for features in (real, fake))
    reach, reach_fake = around_real[:, neighbours - 1], around_fake[:, neighbours - 1]
    reach_density = around_real[:, density_neighbours - 1]

    precise = covering = 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows, squared in _squared_distances(fake, real, block):
        # A border belongs to precision's and recall's balls, but not to the others', as in their authors' programs.
        precise += int((squared <= reach).any(1).sum())
        recalled |= (squared <= reach_fake[rows, None]).any(0)
        inside = squared < reach_density
        covering += int(inside.sum())
        covered |= inside.any(0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.double().mean()),
        "density": covering / (density_neighbours * len(fake)),
        "coverage": float(covered.double().mean()),
    }


def _nearest(features: Tensor, count: int, block: int) -> Tensor:
    """(N, count) float64: of each vector the squared distances to its nearest others, rising."""
    found = []
    for rows, squared in _squared_distances(features, features, block):
        squared[:, rows].fill_diagonal_(torch.inf)  # itself
        found.append(squared.topk(count, largest=False).values)
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """The (N of a, N of b) float64 matrix of |a_i - b_j|^2, some whole rows at a time, with where they stand."""
    lengths = torch.cat([part.double().square().sum(1) for part in b.split(_COLUMNS)])
    for start in range(0, len(a), max(1, block // len(b))):
        rows = slice(start, min(start + max(1, block // len(b)), len(a)))
        here = a[rows].double()
        squared = here.square().sum(1, keepdim=True) + lengths
        for column in range(0, len(b), _COLUMNS):
            columns = slice(column, column + _COLUMNS)
            squared[:, columns].addmm_(here, b[columns].double().T, alpha=-2)
        yield rows, squared.clamp_min_(0)
