"""Validity of predictions: a few numbers a step, for which numpy takes longer than for thousands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["are_probs"]

MAX_PROB = 1.01
"""Largest valid probability; above 1, as sums over a vocabulary are rounded."""


@kernel
def are_probs(values: NDArray[np.float32], valid: NDArray[np.bool_]) -> bool:
    """Writes which rows hold probabilities only: no NaN, nothing negative or above 1.

    Args:
        values: float32, shape (m, k).
        valid: bool, shape (m,). Written.

    Returns:
        True if all do.
    """
    every = True
    for row in range(len(values)):
        valid[row] = True
        for value in values[row]:
            if not 0.0 <= value <= MAX_PROB:
                valid[row] = every = False
    return every
