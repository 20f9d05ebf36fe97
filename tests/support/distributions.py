"""Tests that samples follow a distribution: Pearson's chi-square and total variation, without scipy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

__all__ = ["chi_square_z", "excess_variation"]

FEWEST = 5.0
"""Outcomes expected less often are counted together, as usual for the chi-square approximation."""


def chi_square_z(samples: Sequence[Hashable], distribution: Mapping[Hashable, float]) -> float:
    """Pearson's chi-square as a standard normal variable (Wilson and Hilferty, 1931); above 4 is no chance.

    An outcome that the distribution does not know gives infinity.
    """
    counts = Counter(samples)
    if any(distribution.get(outcome, 0.0) <= 0.0 for outcome in counts):
        return math.inf
    total = len(samples)
    statistic, cells, rest, rest_count = 0.0, 0, 0.0, 0
    for outcome, prob in distribution.items():
        expected = prob * total
        if expected < FEWEST:
            rest, rest_count = rest + expected, rest_count + counts[outcome]
        else:
            statistic, cells = statistic + (counts[outcome] - expected) ** 2 / expected, cells + 1
    if rest >= FEWEST:
        statistic, cells = statistic + (rest_count - rest) ** 2 / rest, cells + 1
    freedom = cells - 1
    assert freedom > 0
    spread = 2.0 / (9.0 * freedom)
    return ((statistic / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)


def excess_variation(samples: Sequence[Hashable], distribution: Mapping[Hashable, float]) -> float:
    """Total variation from the distribution, over what so many samples of it have on average."""
    counts, total = Counter(samples), len(samples)
    outcomes = set(distribution) | set(counts)
    found = 0.5 * sum(abs(counts[o] / total - distribution.get(o, 0.0)) for o in outcomes)
    # Mean absolute deviation of a binomial share, by its normal approximation.
    usual = 0.5 * sum(math.sqrt(2.0 * p * (1.0 - p) / (math.pi * total)) for p in distribution.values())
    return found / usual
