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
    RANK,
    RANKS,
    RAW,
    SOURCES,
    cell_of,
    guess,
    length_bucket,
    log_odds,
    mixed_odds,
    place_in,
)

TOP = 4
"""Children taken from one source for one node."""

MOST = 8
"""Candidates kept for one node."""


@inner_kernel
def add_children(
    place: int,
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
        place: Of the source, below SOURCES.
        found: Number of its children; they are reordered.
        needed: Probability below which a child is left out.
        first: The node's first candidate.
        size: Candidates so far, those of other nodes included.
        tokens: int32, shape (candidates,).
        evidence: float32, shape (candidates, EVIDENCE).
        left: float64, shape (SOURCES,). Gets the log of the probability that the source leaves for other
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
        evidence[node, ODDS + place] = log_odds(prob)
        evidence[node, LENGTH + place] = length_bucket(length)
        evidence[node, RANK] = min(evidence[node, RANK], np.float32(rank))
        evidence[node, MASK] += 1 << place
    left[place] = np.log(max(1.0 - covered, LEAST_LEFT)) if covered > 0.0 else 0.0
    return size


@inner_kernel
def choose(
    first: int,
    size: int,
    depth: int,
    evidence: NDArray[np.float32],
    left: NDArray[np.float64],
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    prior: float,
) -> tuple[int, float]:
    """The candidate most likely to be accepted, by the rule of `fusion.fuse`, and how likely it is.

    Args:
        first: The node's first candidate; its last is ``size - 1``.
        depth: Of the candidates below the root.
        evidence: float32, shape (candidates, EVIDENCE). Completed here.
        left: float64, shape (SOURCES,). From `add_children`; 0 for a source without children.
    """
    best = first
    best_prob = -1.0
    for node in range(first, size):
        mask = place_in(evidence[node, MASK], MASKS)
        evidence[node, DEPTH] = depth
        for place in range(SOURCES):
            if left[place] < 0.0 and not mask >> place & 1:
                evidence[node, LEFT + place] = left[place]
        odds = mixed_odds(evidence[node], weights, parameters, request)
        raw = guess(1.0 / (1.0 + np.exp(-odds)))
        cell = cell_of(mask, odds)
        evidence[node, RAW] = raw
        evidence[node, CELL] = cell
        prob = guess(raw * (accepted[cell] + prior) / (expected[cell] + prior))
        if prob > best_prob:
            best, best_prob = node, prob
    return best, best_prob
