"""Model inputs of a draft tree, written where the host can write them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["pack_tree", "write_mask"]

ROWS, LEFT, RIGHT, STALE = range(4)
"""State of a mask: rows and columns of the tree written last, and committed columns hidden in those rows."""


@kernel
def pack_tree(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    depths: NDArray[np.int32],
    root: int,
    nodes: int,
    out: NDArray[np.int64],
    hidden: NDArray[np.bool_],
) -> int:
    """Writes tokens, positions and depths, and which nodes do not see which.

    Padding has the root's position, and is seen by itself alone.

    Args:
        tokens: int32, shape (n,), as the next two: the tree's.
        root: Position of the root.
        nodes: Nodes of the padded tree.
        out: int64, shape (3 * nodes, or more). Written.
        hidden: bool, shape (nodes * nodes, or more). Written, row by row, but for a root alone.

    Returns:
        The largest depth.
    """
    max_depth = 0
    for node in range(nodes):
        real = node < len(tokens)
        depth = depths[node] if real else 0
        max_depth = max(max_depth, depth)
        out[node] = tokens[node] if real else 0
        out[nodes + node] = root + depth
        out[2 * nodes + node] = depth
        if nodes > 1:
            row, above = node * nodes, (parents[node] if real else -1) * nodes
            for other in range(nodes):
                hidden[row + other] = above < 0 or hidden[above + other]
            hidden[row + node] = False
    return max_depth


@kernel
def write_mask(
    bits: NDArray[Any],
    minimum: int,
    hidden: NDArray[np.bool_],
    depths: NDArray[np.int64],
    nodes: int,
    length: int,
    window: int,
    state: NDArray[np.int64],
) -> None:
    """Clears what the last tree hid in an additive mask, and hides what this one must not see.

    Columns are the committed tokens that the root sees, then the nodes.

    Args:
        bits: int16, int32 or int64, shape (rows, columns). The floats of the mask; those of zeros are zero.
        minimum: Bits of the least float.
        hidden: bool, shape (nodes * nodes, or more), row by row. True where the row's node must not see one.
        depths: int64, shape (nodes, or more).
        nodes: Nodes of the tree.
        length: Committed tokens.
        window: Of the layer; more than any length where it has none.
        state: int64, shape (4,). Changed.
    """
    for row in range(state[ROWS]):
        bits[row, : state[STALE]] = 0
        bits[row, state[LEFT] : state[RIGHT]] = 0
    past = length - window + 1  # the first token that the root sees, were there none before the text
    begin = length - max(past, 0)
    stale = 0
    for node in range(nodes):
        gone = min(max(depths[node] + min(past, 0), 0), begin)
        stale = max(stale, gone)
        bits[node, :gone] = minimum
        for other in range(nodes):
            if hidden[node * nodes + other] or depths[node] - depths[other] >= window:
                bits[node, begin + other] = minimum
    state[ROWS], state[LEFT], state[RIGHT], state[STALE] = nodes, begin, begin + nodes, stale
