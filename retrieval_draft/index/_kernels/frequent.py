"""The tokens seen most often, kept up to date without sorting.

counts[t]    decayed count of token t
slots[t]     index of t in `frequent`, -1 if absent
frequent[s]  the most frequent tokens, in no order, -1 where there are fewer
total[0]     sum of all counts
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel


@kernel
def count(
    counts: NDArray[np.float32],
    slots: NDArray[np.int32],
    frequent: NDArray[np.int32],
    total: NDArray[np.float64],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    most_ids: int,
    fade: float,
) -> int:
    """Adds `probs` to the counts of `tokens`; those with the largest counts stay in `frequent`.

    Invariant: no token outside `frequent` has a larger count than one inside. Counts only grow between
    fades, and a fade scales all alike, so the token whose count has just grown is compared with the least
    inside only.

    Args:
        counts: float32, shape (ids,). Changed, as are the next three.
        slots: int32, shape (ids,).
        frequent: int32, shape (kept,).
        total: float64, shape (1,).
        tokens: int32, shape (m, k). -1 where a row has fewer.
        probs: float32, shape (m, k).
        most_ids: Smallest id that is not counted.
        fade: Total at which all counts are halved.

    Returns:
        Entries that `counts` and `slots` need; where they have fewer, nothing was counted.
    """
    needed = 0
    for token in tokens.flat:
        if token < most_ids:
            needed = max(needed, token + 1)
    if needed > len(counts):
        return needed
    least = -1  # in a slot of `frequent` that is free, or whose token has the least count
    for row in range(tokens.shape[0]):
        for column in range(tokens.shape[1]):
            token, prob = tokens[row, column], probs[row, column]
            if token < 0 or token >= most_ids or not prob >= 0.0 or prob == np.inf:
                continue
            counts[token] += prob
            total[0] += prob
            if slots[token] >= 0:
                if slots[token] == least:
                    least = -1
                continue
            if least < 0:
                least = 0
                for slot in range(len(frequent)):
                    if frequent[slot] < 0:
                        least = slot
                        break
                    if counts[frequent[slot]] < counts[frequent[least]]:
                        least = slot
            if frequent[least] >= 0:
                if counts[frequent[least]] >= counts[token]:
                    continue
                slots[frequent[least]] = -1
            frequent[least] = token
            slots[token] = least
            least = -1
    if total[0] > fade:
        total[0] *= 0.5
        for token in range(len(counts)):
            counts[token] *= np.float32(0.5)
    return needed
