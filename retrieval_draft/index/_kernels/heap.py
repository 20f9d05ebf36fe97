"""A binary heap of candidate nodes, and the path probability below which no candidate can matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index._kernels.jit import kernel

BUCKETS = 72
LOWEST = (1023 - 17) << 2
"""Path probabilities fall into quarter octaves by the top bits of their float64; below 2**-17 is no guess."""

THRESHOLDS = np.array([(LOWEST + bucket) << 50 for bucket in range(BUCKETS)], np.int64).view(np.float64)


@kernel
def _before(path_probs: NDArray[np.float64], first: int, second: int) -> bool:
    """Heap order: the more probable first, the earlier among equals, so that ties stay prefix-closed."""
    if path_probs[first] != path_probs[second]:
        return path_probs[first] > path_probs[second]
    return first < second


@kernel
def push(heap: NDArray[np.int32], size: int, path_probs: NDArray[np.float64], item: int) -> None:
    """Adds `item` to a binary heap ordered by `path_probs`."""
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
    """Takes the best item off a heap of `size` items."""
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
