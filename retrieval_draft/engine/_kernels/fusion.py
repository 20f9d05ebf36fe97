"""Union of proposals into one trie, its best nodes, and what the outcome of a step says about them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index._kernels.heap import pop, push
from retrieval_draft.index._kernels.jit import kernel

BINS = 16
MASKS = 16
CELLS = MASKS * BINS
"""A calibration cell is the set of sources that named a node, and a bin of the log odds they give it."""

CERTAIN = 0.999


@kernel
def cell_of(mask: int, prob: float) -> int:
    """The calibration cell of a node that the sources in `mask` give `prob` together."""
    odds = np.log(prob / (1.0 - prob))
    place = int(odds * 1.5 + BINS / 2)
    return (mask % MASKS) * BINS + min(max(place, 0), BINS - 1)


@kernel
def fuse(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    starts: NDArray[np.int64],
    ratios: NDArray[np.float64],
    budget: int,
    out_tokens: NDArray[np.int32],
    out_parents: NDArray[np.int32],
    out_depths: NDArray[np.int32],
    out_probs: NDArray[np.float32],
    out_paths: NDArray[np.float32],
    out_sources: NDArray[np.int64],
    out_raw: NDArray[np.float32],
    out_cells: NDArray[np.int32],
) -> int:
    """Merges proposals into a trie and writes its root and `budget` most probable nodes, best first.

    A node that several sources name is believed as if they were independent: 1 - prod(1 - p). The ratio
    of its cell then turns that into what was accepted in like cases. A parent is at least as probable as
    its child and has the smaller number, so the order (path probability down, number up) is prefix-closed
    under any ties.

    Args:
        tokens: int32, shape (total,). All proposals one after the other.
        parents: int32, shape (total,). Within each proposal, -1 for the root.
        probs: float32, shape (total,).
        starts: int64, shape (proposals + 1,).
        ratios: float64, shape (CELLS,). Accepted over expected.
        out_tokens: int32, shape (budget + 1,), the root's already in place; the others alike.

    Returns:
        Nodes written, the root included.
    """
    total = len(tokens)
    trie_token = np.empty(total + 1, np.int32)
    trie_parent = np.empty(total + 1, np.int32)
    trie_depth = np.zeros(total + 1, np.int32)
    trie_child = np.full(total + 1, -1, np.int32)
    trie_sibling = np.full(total + 1, -1, np.int32)
    trie_mask = np.zeros(total + 1, np.int64)
    trie_prob = np.empty(total + 1, np.float64)
    place_of = np.empty(total, np.int32)
    size = 1
    for source in range(len(starts) - 1):
        start = starts[source]
        for item in range(start, starts[source + 1]):
            parent = 0 if parents[item] < 0 else place_of[start + parents[item]]
            node = trie_child[parent]
            while node >= 0 and trie_token[node] != tokens[item]:
                node = trie_sibling[node]
            if node < 0:
                node = size
                size += 1
                trie_token[node] = tokens[item]
                trie_parent[node] = parent
                trie_depth[node] = trie_depth[parent] + 1
                trie_sibling[node] = trie_child[parent]
                trie_child[parent] = node
                trie_prob[node] = 0.0
            if probs[item] > 0.0:  # else it only leads to others
                trie_prob[node] = 1.0 - (1.0 - trie_prob[node]) * (1.0 - probs[item])
                trie_mask[node] |= 1 << source
            place_of[item] = node

    path = np.empty(size, np.float64)
    calibrated = np.empty(size, np.float64)
    cells = np.empty(size, np.int32)
    heap = np.empty(size, np.int32)
    path[0] = 1.0
    for node in range(1, size):
        raw = min(max(trie_prob[node], 1e-6), CERTAIN)
        trie_prob[node] = raw
        cells[node] = cell_of(trie_mask[node], raw)
        calibrated[node] = min(raw * ratios[cells[node]], CERTAIN)
        path[node] = path[trie_parent[node]] * calibrated[node]
        push(heap, node - 1, path, node)
    chosen = min(budget, size - 1)
    placed = np.empty(size, np.int32)
    placed[0] = 0
    waiting = size - 1
    for place in range(1, chosen + 1):
        node = pop(heap, waiting, path)
        waiting -= 1
        placed[node] = place
        out_tokens[place] = trie_token[node]
        out_parents[place] = placed[trie_parent[node]]
        out_depths[place] = trie_depth[node]
        out_probs[place] = calibrated[node]
        out_paths[place] = path[node]
        out_sources[place] = trie_mask[node]
        out_raw[place] = trie_prob[node]
        out_cells[place] = cells[node]
    return chosen + 1


@kernel
def score(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    raw: NDArray[np.float32],
    cells: NDArray[np.int32],
    emitted: NDArray[np.int32],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    memory: float,
) -> None:
    """Adds the outcome of every node whose parent was accepted to its cell; old outcomes fade by halves."""
    depth = np.full(len(tokens), -1, np.int64)
    depth[0] = 0
    for node in range(1, len(tokens)):
        above = depth[parents[node]]
        if above < 0 or above >= len(emitted):
            continue
        cell = cells[node]
        expected[cell] += raw[node]
        if tokens[node] == emitted[above]:
            accepted[cell] += 1.0
            depth[node] = above + 1
        if expected[cell] > memory:
            expected[cell] *= 0.5
            accepted[cell] *= 0.5
