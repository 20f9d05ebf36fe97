"""One node of a chain in the adjacency matrix, in parts, so that rows overlap their memory fetches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import inner_kernel
from retrieval_draft.index._kernels.adjacency import NO_ROW, ORDERS, guesses_of


@inner_kernel
def expand_adjacency(
    visits: NDArray[np.int32],
    row_tokens: NDArray[np.int32],
    row_probs: NDArray[np.float32],
    backoff: NDArray[np.float64],
    rows: NDArray[np.int64],
    needed: float,
    tokens: NDArray[np.int32],
    probs: NDArray[np.float64],
    lengths: NDArray[np.int32],
) -> int:
    """Next tokens from the rows of the last 4, 3, 2 and 1 tokens, blended as in `adjacency.propose`.

    Tokens that are merely frequent are left out: none of them is likely enough to continue the chain.

    Args:
        visits: int32, shape (table rows,).
        row_tokens: int32, shape (table rows, k).
        row_probs: float32, shape (table rows, k).
        backoff: float64, shape (5,). Back-off constant of each order.
        rows: int64, shape (4,). From `ask_rows`.
        needed: Probability below which a child is of no use.
        tokens: int32, shape (children,), their limit. Written, as are the next two.
        probs: float64, shape (children,).
        lengths: int32, shape (children,). Match lengths.

    Returns:
        Children written.
    """
    found = 0
    mass = 1.0
    for back in range(ORDERS):
        row = rows[back]
        if row == NO_ROW or mass <= needed:
            continue
        order = ORDERS - back
        weight = mass * visits[row] / (visits[row] + backoff[order])
        mass -= weight
        tokens_of, probs_of = guesses_of(row_tokens, row_probs, row)
        for column in range(len(tokens_of)):
            token = tokens_of[column]
            share = weight * probs_of[column]
            if token < 0 or share <= 0.25 * needed:  # the most probable come first
                break
            match = 0
            while match < found and tokens[match] != token:
                match += 1
            if match < found:
                probs[match] += share
            elif found < len(tokens):
                tokens[found] = token
                probs[found] = share
                lengths[found] = order
                found += 1
    return found
