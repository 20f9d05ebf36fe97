"""Best-first draft trees from a suffix automaton."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.heap import BUCKETS, CUT, THRESHOLDS, admit, pop
from retrieval_draft._kernels.jit import kernel
from retrieval_draft.index._kernels.automaton import (
    COUNT,
    DEGREE,
    FIRST_EDGE,
    LENGTH,
    LINK,
    NEXT,
    TAKEN,
    TARGET,
    TOKEN,
    matched_state,
)

CHILDREN = 12
"""Edges read from one state's list, and children kept for one node."""

CHAIN = 8
"""Contexts blended for one node, longest first."""


@kernel
def propose(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    meta: NDArray[np.int64],
    params: NDArray[np.float64],
    budget: int,
    work_int: NDArray[np.int32],
    work_float: NDArray[np.float64],
    work_bits: NDArray[np.int64],
    heap: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    lengths: NDArray[np.int32],
) -> int:
    """Best-first tree over the blended counts of all matched contexts.

    A node's children come from every context that ends at it, the longest first. A context that was followed
    by `total` tokens, `distinct` of them different, takes a part of the probability mass that reaches it and
    leaves ``(e*distinct / (total + e*distinct)) ** orders`` to the shorter ones (escape of PPM-C, Moffat
    1990, with a factor e), `orders` being the number of context lengths of the state.

    A candidate matters only while fewer than `budget` better ones are known, so the mass needed to enter the
    tree rises with the candidates, and contexts with less are not read.

    Args:
        states: int32, shape (room, STATE_FIELDS).
        edges: int32, shape (room, EDGE_FIELDS).
        meta: int64, shape (META_FIELDS,).
        params: float64, shape (3,): escape factor, order cap, recency.
        work_int: int32, shape (candidates, 4): parent node, token, state, match length.
        work_float: float64, shape (2, candidates): path probability, probability given the parent.
        work_bits: int64. The memory of `work_float`.
        heap: int32, shape (candidates,). Scratch.
        tokens: int32, shape (budget,). Written, as are the next three.
        parents: int32, shape (budget,). -1 for children of the root.
        probs: float32, shape (budget,). Probability given the parent.
        lengths: int32, shape (budget,). Match lengths.

    Returns:
        Nodes written to `tokens`, `parents`, `probs` and `lengths`.
    """
    escape = params[0]
    cap = np.int64(params[1])
    recency = params[2]
    child_token = np.empty(CHILDREN, np.int32)
    child_state = np.empty(CHILDREN, np.int32)
    child_length = np.empty(CHILDREN, np.int32)
    child_prob = np.empty(CHILDREN, np.float64)
    histogram = np.zeros(BUCKETS, np.int64)
    path_probs = work_float[0]
    path_bits = work_bits[0]

    state = matched_state(states, meta)
    if budget <= 0:
        return 0
    length = states[state, LENGTH]
    nodes = 0
    candidates = 0
    waiting = 0
    cut = np.zeros(2, np.int64)
    path = 1.0
    node = -1
    while True:
        needed = THRESHOLDS[cut[CUT]]
        found = 0
        mass = 1.0
        context = state
        steps = 0
        while context > 0 and steps < CHAIN and mass * path > needed:
            shorter = states[context, LINK]
            below = states[shorter, LENGTH]
            total = states[context, COUNT]
            edge = states[context, FIRST_EDGE]
            if edge >= 0 and total > 0:
                distinct = states[context, DEGREE]
                escape_per_order = escape * distinct / (total + escape * distinct)
                escape_prob = escape_per_order
                for _ in range(min(length, cap) - min(below, cap) - 1):
                    escape_prob *= escape_per_order
                weight = mass * (1.0 - escape_prob) / (total + recency)
                mass *= escape_prob
                read = 0
                unread = total + recency
                # Stop where the unread mass cannot add one more child to the tree.
                while edge >= 0 and read < CHILDREN and weight * unread * path > needed:
                    token = edges[edge, TOKEN]
                    count = edges[edge, TAKEN] + (recency if read == 0 else 0.0)
                    share = weight * count
                    unread -= count
                    child = 0
                    while child < found and child_token[child] != token:
                        child += 1
                    if child < found:
                        child_prob[child] += share
                    elif found < CHILDREN:
                        child_token[found] = token
                        child_state[found] = edges[edge, TARGET]
                        child_length[found] = length + 1
                        child_prob[found] = share
                        found += 1
                    edge = edges[edge, NEXT]
                    read += 1
            context = shorter
            length = below
            steps += 1
        for child in range(found):
            prob = min(child_prob[child], 0.999)
            if prob * path <= needed or candidates == len(path_probs):
                continue
            path_probs[candidates] = prob * path
            if not admit(candidates, path_probs, path_bits, heap, waiting, histogram, cut, budget):
                continue
            work_int[candidates, 0] = node
            work_int[candidates, 1] = child_token[child]
            work_int[candidates, 2] = child_state[child]
            work_int[candidates, 3] = child_length[child]
            work_float[1, candidates] = prob
            waiting += 1
            candidates += 1
        if waiting == 0:
            return nodes
        best = pop(heap, waiting, path_probs)
        waiting -= 1
        node = nodes
        nodes += 1
        parents[node] = work_int[best, 0]
        tokens[node] = work_int[best, 1]
        state = work_int[best, 2]
        length = work_int[best, 3]
        lengths[node] = length - 1
        path = path_probs[best]
        probs[node] = work_float[1, best]
        if nodes == budget:
            return nodes
