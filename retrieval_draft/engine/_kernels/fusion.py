"""Union of proposals into one trie, its best nodes, and what the outcome of a step says about them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index._kernels.heap import pop, push
from retrieval_draft.index._kernels.jit import kernel

MASKS = 256
SOURCES = 8
"""Sources beyond the eighth share its place: sets of sources are bit masks."""

BINS = 16
CELLS = MASKS * BINS
"""A calibration cell is the set of sources that named a node, and a bin of the log odds they give it."""

CERTAIN = 0.999
UNLIKELY = 1e-6


@kernel
def log_odds(prob: float) -> float:
    """Log odds of a probability, kept finite."""
    kept = min(max(prob, UNLIKELY), CERTAIN)
    return np.log(kept / (1.0 - kept))


@kernel
def cell_of(mask: int, prob: float) -> int:
    """The calibration cell of a node that the sources in `mask` give `prob` together."""
    place = int(log_odds(prob) * 1.5 + BINS / 2)
    return mask * BINS + min(max(place, 0), BINS - 1)


@kernel
def fuse(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    starts: NDArray[np.int64],
    weights: NDArray[np.float64],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    prior: float,
    budget: int,
    out_tokens: NDArray[np.int32],
    out_parents: NDArray[np.int32],
    out_depths: NDArray[np.int32],
    out_probs: NDArray[np.float32],
    out_paths: NDArray[np.float32],
    out_sources: NDArray[np.int64],
    out_raw: NDArray[np.float32],
    out_cells: NDArray[np.int32],
    out_odds: NDArray[np.float32],
) -> int:
    """Merges proposals into a trie and writes its root and `budget` most probable nodes, best first.

    What the sources of a node say is mixed in log odds, with weights of its set of sources. The ratio of its
    cell then turns that into what was accepted in like cases. A parent is at least as probable as its child
    and has the smaller number, so the order (path probability down, number up) is prefix-closed under ties.

    Args:
        tokens: int32, shape (total,). All proposals one after the other.
        parents: int32, shape (total,). Within each proposal, -1 for the root.
        probs: float32, shape (total,).
        starts: int64, shape (proposals + 1,).
        weights: float64, shape (MASKS, SOURCES + 1). Of each source's log odds, and 1's, by set of sources.
        expected: float64, shape (CELLS,). Sum of estimates seen so far.
        accepted: float64, shape (CELLS,). How many of them came true.
        prior: Expected acceptances that each cell starts with, all of them met.
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
    trie_odds = np.zeros((total + 1, SOURCES), np.float32)
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
            place = min(source, SOURCES - 1)
            trie_odds[node, place] = log_odds(probs[item])
            trie_mask[node] |= 1 << place
            place_of[item] = node

    path = np.empty(size, np.float64)
    raw = np.empty(size, np.float64)
    calibrated = np.empty(size, np.float64)
    cells = np.empty(size, np.int32)
    heap = np.empty(size, np.int32)
    path[0] = 1.0
    for node in range(1, size):
        mask = trie_mask[node]
        odds = weights[mask, SOURCES]
        for place in range(SOURCES):
            odds += weights[mask, place] * trie_odds[node, place]
        raw[node] = min(max(1.0 / (1.0 + np.exp(-odds)), UNLIKELY), CERTAIN) if mask else UNLIKELY
        cells[node] = cell_of(mask, raw[node])
        ratio = (accepted[cells[node]] + prior) / (expected[cells[node]] + prior)
        calibrated[node] = min(raw[node] * ratio, CERTAIN)
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
        out_raw[place] = raw[node]
        out_cells[place] = cells[node]
        out_odds[place] = trie_odds[node]
    return chosen + 1


@kernel
def score(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    raw: NDArray[np.float32],
    cells: NDArray[np.int32],
    odds: NDArray[np.float32],
    emitted: NDArray[np.int32],
    weights: NDArray[np.float64],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    rate: float,
    memory: float,
) -> None:
    """Learns from every node whose parent was accepted: it was, or was not, what the target emitted.

    The weights of its set of sources take a step of logistic regression, its cell counts the outcome; old
    outcomes fade by halves.
    """
    depth = np.full(len(tokens), -1, np.int64)
    depth[0] = 0
    for node in range(1, len(tokens)):
        above = depth[parents[node]]
        if above < 0 or above >= len(emitted):
            continue
        cell = cells[node]
        mask = cell // BINS
        taken = 1.0 if tokens[node] == emitted[above] else 0.0
        if taken > 0.0:
            depth[node] = above + 1
        step = rate * (taken - raw[node])
        weights[mask, SOURCES] += step
        for place in range(SOURCES):
            weights[mask, place] = min(max(weights[mask, place] + step * odds[node, place], 0.0), 2.0)
        expected[cell] += raw[node]
        accepted[cell] += taken
        if expected[cell] > memory:
            expected[cell] *= 0.5
            accepted[cell] *= 0.5
