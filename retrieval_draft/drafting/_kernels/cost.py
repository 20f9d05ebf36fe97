"""The number of draft nodes that pays best, from their path probabilities and the time of passes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["best_nodes"]


@kernel
def best_nodes(
    path_probs: NDArray[np.float32],
    curve: NDArray[np.float64],
    rows: int,
    carried: int,
    overhead: float,
    least_rate: float,
) -> int:
    """The number of nodes with the most tokens beyond those that their time would yield in other steps.

    Args:
        path_probs: float32, shape (n,). Of the draft nodes, best first.
        curve: float64, shape (m,). Seconds of a pass over 1, 2, ... tokens.
        rows: Rows that share the pass, each with a root.
        carried: Accepted tokens that the pass repeats; -1 where no pass repeats any.
        overhead: Seconds of a step outside its pass.
        least_rate: Tokens a second of other steps.

    Returns:
        n in 0..len(path_probs).
    """
    size = len(path_probs) + 1
    expected, seconds = np.empty(size), np.empty(size)
    first, rate, total = rows - 1 + max(carried, 0), least_rate, float(rows)
    for nodes in range(size):
        if nodes:
            total += path_probs[nodes - 1]
        expected[nodes], seconds[nodes] = total, curve[first + nodes] + overhead
        if carried >= 0 and nodes:
            # Unless all drafts are accepted, those that are have to be repeated.
            again = curve[carried + int(np.rint(total))] - curve[0]
            seconds[nodes] += (1.0 - path_probs[nodes - 1]) * again
        rate = max(rate, total / seconds[nodes])
    best = 0
    for nodes in range(1, size):
        if expected[nodes] - rate * seconds[nodes] > expected[best] - rate * seconds[best]:
            best = nodes
    return best
