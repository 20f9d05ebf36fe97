"""The best chain of a draft tree, for engines that verify one path."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["best_chain"]


@kernel
def best_chain(
    parents: NDArray[np.int32],
    depths: NDArray[np.int32],
    path_probs: NDArray[np.float32],
    max_depth: int,
    min_prob: float,
    gains: NDArray[np.float32],
    chain: NDArray[np.int32],
) -> int:
    """The path from the root whose path probabilities sum to the most: the most tokens accepted on average.

    Invariant: after node i has been visited from the end, ``gains[parents[i]]`` is the best sum of any path
    below that parent through the children visited so far. The way down takes, at each node, the child whose
    own probability and gain sum to that.

    Args:
        parents: int32, shape (n + 1,), parents before children.
        depths: int32, shape (n + 1,).
        path_probs: float32, shape (n + 1,).
        max_depth: Largest length of a chain.
        min_prob: Smallest path probability of a node in the chain.
        gains: float32, shape (n + 1,). Scratch.
        chain: int32, shape (deepest,). Nodes of the chain, root excluded, are written here.

    Returns:
        Length of the chain.

    Example:
        parents [-1, 0, 1, 0, 3], path_probs [1, .5, .1, .4, .35]  ->  nodes [3, 4]: .75 beats .6
    """
    size = len(parents)
    gains[:size] = 0.0
    for node in range(size - 1, 0, -1):
        if depths[node] <= max_depth and path_probs[node] >= min_prob and 0 <= parents[node] < node:
            gain = path_probs[node] + gains[node]
            if gain > gains[parents[node]]:
                gains[parents[node]] = gain
    length = 0
    node = 0
    for child in range(1, size):
        if length == max_depth or gains[node] == 0.0:
            break
        if (
            parents[child] == node
            and path_probs[child] >= min_prob
            and path_probs[child] + gains[child] == gains[node]
        ):
            chain[length] = child
            length += 1
            node = child
    return length
