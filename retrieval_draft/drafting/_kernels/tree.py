"""Passes over the nodes of a draft tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["fits", "write_contexts"]


@kernel
def fits(tokens: NDArray[np.int32], depths: NDArray[np.int32], max_depth: int, vocabulary: int) -> bool:
    """True if all nodes have tokens of the vocabulary, and none is too deep.

    Args:
        tokens: int32, shape (n,), as the next one.
        depths: Of the nodes.
        max_depth: The largest depth.
        vocabulary: Number of token ids.
    """
    for node in range(len(tokens)):
        if depths[node] > max_depth or not 0 <= tokens[node] < vocabulary:
            return False
    return True


@kernel
def write_contexts(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    tail: NDArray[np.int32],
    out: NDArray[np.int32],
) -> None:
    """Writes the last tokens at every node, the node's own last.

    Args:
        tokens: int32, shape (n,), as the next one.
        parents: Of the nodes, -1 for the root.
        tail: int32, shape (length,). Text before the root.
        out: int32, shape (n, width). Written; -1 where the text is shorter.
    """
    width = out.shape[1]
    for node in range(len(tokens)):
        for column in range(width - 1):
            if node:
                out[node, column] = out[parents[node], column + 1]
            else:
                back = width - 1 - column
                out[node, column] = tail[len(tail) - back] if back <= len(tail) else -1
        out[node, width - 1] = tokens[node]
