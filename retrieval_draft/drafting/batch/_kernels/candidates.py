"""Candidates after one node of a chain: the sources' children united and weighed, and the best one chosen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import inner_kernel
from retrieval_draft.drafting._kernels.fusion import (
    CELL,
    DEPTH,
    LEAST_LEFT,
    LEFT,
    LENGTH,
    MASK,
    MASKS,
    ODDS,
    OWN,
    PER_SOURCE,
    RANK,
    RANKS,
    RAW,
    TIME,
    cell_of,
    guess,
    index_in,
    length_bucket,
    log_odds,
    mixed_odds,
    times_of,
)

TOP = 4
"""Children taken from one source for one node."""

MOST = 8
"""Candidates kept for one node."""


@inner_kernel
def add_children(
    column: int,
    source_slot: int,
    found: int,
    child_token: NDArray[np.int32],
    child_prob: NDArray[np.float64],
    child_length: NDArray[np.int32],
    needed: float,
    first: int,
    size: int,
    tokens: NDArray[np.int32],
    evidence: NDArray[np.float32],
    left: NDArray[np.float64],
) -> int:
    """Unites the best children of one source with the candidates of a node.

    Args:
        column: Index of the source among those in use.
        source_slot: Of the source in the calibration.
        found: Number of its children; they are reordered.
        child_token: int32, shape (children,).
        child_prob: float64, shape (children,).
        child_length: int32, shape (children,). Match lengths.
        needed: Probability below which a child is left out.
        first: The node's first candidate.
        size: Candidates so far, those of other nodes included.
        tokens: int32, shape (candidates,).
        evidence: float32, shape (candidates, columns).
        left: float64, shape (sources,). Gets the log of the probability that the source leaves for other
            tokens.

    Returns:
        Candidates now.
    """
    covered = 0.0
    for child in range(found):
        child_prob[child] = guess(child_prob[child])
        covered += child_prob[child]
    for rank in range(min(found, TOP)):
        best = rank
        for other in range(rank + 1, found):
            if child_prob[other] > child_prob[best]:
                best = other
        token, prob, length = child_token[best], child_prob[best], child_length[best]
        if prob < needed:
            break
        for other in range(best, rank, -1):  # a stable order
            child_token[other] = child_token[other - 1]
            child_prob[other] = child_prob[other - 1]
            child_length[other] = child_length[other - 1]
        node = first
        while node < size and tokens[node] != token:
            node += 1
        if node == size:
            if size - first == MOST or size == len(tokens):
                continue
            tokens[node] = token
            evidence[node] = 0.0
            evidence[node, RANK] = RANKS - 1
            size += 1
        own = OWN + PER_SOURCE * column
        evidence[node, own + ODDS] = log_odds(prob)
        evidence[node, own + LENGTH] = length_bucket(length)
        evidence[node, RANK] = min(evidence[node, RANK], np.float32(rank))
        evidence[node, MASK] += 1 << source_slot
    left[column] = np.log(max(1.0 - covered, LEAST_LEFT)) if covered > 0.0 else 0.0
    return size


@inner_kernel
def choose(
    first: int,
    size: int,
    depth: int,
    tokens: NDArray[np.int32],
    evidence: NDArray[np.float32],
    left: NDArray[np.float64],
    source_slots: NDArray[np.int64],
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    occurrences: NDArray[np.uint8],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    prior: float,
) -> tuple[int, float]:
    """The candidate most likely to be accepted, by the rule of `fusion.fuse`, and how likely it is.

    Args:
        first: The node's first candidate; its last is ``size - 1``.
        depth: Of the candidates below the root.
        tokens: int32, shape (candidates,).
        evidence: float32, shape (candidates, columns). Completed here.
        left: float64, shape (sources,). From `add_children`; 0 for a source without children.
        source_slots: int64, shape (sources,). Slots of the sources in the calibration, ascending.
        weights: float64, shape (MASKS, SOURCES + 1). As for `fusion.fuse`, like the next six.
        parameters: float64, shape (SOURCES, PARAMETERS).
        request: float64, shape (SOURCES,).
        occurrences: uint8, shape (COUNTERS,).
        expected: float64, shape (CELLS,).
        accepted: float64, shape (CELLS,).
        prior: Expected acceptances that a cell starts with.
    """
    best = first
    best_prob = -1.0
    for node in range(first, size):
        mask = index_in(evidence[node, MASK], MASKS)
        evidence[node, DEPTH] = depth
        evidence[node, TIME] = times_of(occurrences, tokens[node])
        for column in range(len(source_slots)):
            if left[column] < 0.0 and not mask >> source_slots[column] & 1:
                evidence[node, OWN + PER_SOURCE * column + LEFT] = left[column]
        odds = mixed_odds(evidence[node], source_slots, weights, parameters, request)
        raw = guess(1.0 / (1.0 + np.exp(-odds)))
        cell = cell_of(mask, odds)
        evidence[node, RAW] = raw
        evidence[node, CELL] = cell
        prob = guess(raw * (accepted[cell] + prior) / (expected[cell] + prior))
        if prob > best_prob:
            best, best_prob = node, prob
    return best, best_prob
