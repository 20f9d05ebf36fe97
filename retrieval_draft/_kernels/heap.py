"""A binary heap of candidate nodes, and the path probability below which no candidate can matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

BUCKETS = 72
LOWEST = (1023 - 17) << 2
"""Path probabilities fall into quarter octaves by the top bits of their float64; those below 2**-17 are
dropped."""

THRESHOLDS = np.array([(LOWEST + bucket) << 50 for bucket in range(BUCKETS)], np.int64).view(np.float64)


@kernel
def _before(path_probs: NDArray[np.float64], first: int, second: int) -> bool:
    """Heap order: the more probable first, the earlier among equals, so that ties stay prefix-closed."""
    if path_probs[first] != path_probs[second]:
        return path_probs[first] > path_probs[second]
    return first < second


@kernel
def push(heap: NDArray[np.int32], size: int, path_probs: NDArray[np.float64], item: int) -> None:
    """Adds `item` to a binary heap ordered by `path_probs`.

    Args:
        heap: int32, shape (n,), n above `size`. Candidates; changed.
        size: Candidates on it.
        path_probs: float64, shape (candidates,).
        item: The candidate.
    """
    slot = size
    while slot > 0:
        above = (slot - 1) >> 1
        if not _before(path_probs, item, heap[above]):
            break
        heap[slot] = heap[above]
        slot = above
    heap[slot] = item


@kernel
def pop(heap: NDArray[np.int32], size: int, path_probs: NDArray[np.float64]) -> int:
    """Removes and returns the best item of a heap of `size` items.

    Args:
        heap: int32, shape (n,). Candidates; changed.
        size: Candidates on it, at least 1.
        path_probs: float64, shape (candidates,).
    """
    best = heap[0]
    item = heap[size - 1]
    size -= 1
    slot = 0
    while True:
        below = 2 * slot + 1
        if below >= size:
            break
        if below + 1 < size and _before(path_probs, heap[below + 1], heap[below]):
            below += 1
        if not _before(path_probs, heap[below], item):
            break
        heap[slot] = heap[below]
        slot = below
    heap[slot] = item
    return best


CUT, ABOVE = range(2)
"""Fields of a cut: the lowest bucket that still matters, and candidates in it or above."""


@kernel
def admit(
    item: int,
    path_probs: NDArray[np.float64],
    path_bits: NDArray[np.int64],
    heap: NDArray[np.int32],
    waiting: int,
    histogram: NDArray[np.int64],
    cut: NDArray[np.int64],
    budget: int,
) -> bool:
    """Adds a candidate to the heap unless `budget` better ones are known, and raises the cut if possible.

    A candidate without a positive path probability is dropped.

    Args:
        item: The candidate; its path probability is in place.
        path_probs: float64, shape (candidates,).
        path_bits: int64, shape (candidates,). The memory of `path_probs`.
        heap: int32, shape (n,). Holds `waiting` candidates.
        waiting: Candidates on the heap.
        histogram: int64, shape (BUCKETS,). Candidates so far, on the heap or removed from it.
        cut: int64, shape (2,): CUT, ABOVE.
        budget: Nodes wanted.

    Returns:
        True if it is on the heap now.
    """
    if not path_probs[item] > 0.0:  # NaN too, whose bits match no bucket
        return False
    bucket = min((path_bits[item] >> 50) - LOWEST, BUCKETS - 1)
    if bucket < cut[CUT]:
        return False
    histogram[bucket] += 1
    cut[ABOVE] += 1
    while cut[CUT] < BUCKETS - 1 and cut[ABOVE] - histogram[cut[CUT]] >= budget:
        cut[ABOVE] -= histogram[cut[CUT]]
        cut[CUT] += 1
    push(heap, waiting, path_probs, item)
    return True
