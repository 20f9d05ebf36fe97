"""One node of a chain in a suffix automaton: its children, and the state after a child."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import inner_kernel
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
    find_edge,
)
from retrieval_draft.index._kernels.automaton_tree import CHAIN


@inner_kernel
def follow_automaton(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    table: NDArray[np.int32],
    state: int,
    length: int,
    token: int,
) -> tuple[int, int]:
    """The longest suffix of the context and `token` that the text holds: its state and length.

    Args:
        states: int32, shape (room, STATE_FIELDS).
        edges: int32, shape (room, EDGE_FIELDS).
        table: int32, shape (size,).
        state: Of the context.
        length: Its tokens.
        token: The token after it.
    """
    while state >= 0:
        edge = find_edge(states, edges, table, state, token)
        if edge >= 0:
            return edges[edge, TARGET], length + 1
        state = states[state, LINK]
        if state >= 0:
            length = states[state, LENGTH]
    return 0, 0


@inner_kernel
def expand_automaton(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    state: int,
    length: int,
    params: NDArray[np.float64],
    needed: float,
    tokens: NDArray[np.int32],
    probs: NDArray[np.float64],
    lengths: NDArray[np.int32],
) -> int:
    """Tokens that followed a context, blended over its suffixes by the rule of `automaton_tree.propose`.

    Args:
        states: int32, shape (room, STATE_FIELDS).
        edges: int32, shape (room, EDGE_FIELDS).
        state: Of the context.
        length: Its tokens.
        params: float64, shape (3,): escape factor, order cap, recency.
        needed: Probability below which a child is of no use.
        tokens: int32, shape (children,), their limit. Written, as are the next two.
        probs: float64, shape (children,).
        lengths: int32, shape (children,). Match lengths.

    Returns:
        Children written.
    """
    escape = params[0]
    cap = np.int64(params[1])
    recency = params[2]
    found = 0
    mass = 1.0
    steps = 0
    while state > 0 and steps < CHAIN and mass > needed:
        shorter = states[state, LINK]
        below = states[shorter, LENGTH]
        total = states[state, COUNT]
        edge = states[state, FIRST_EDGE]
        if edge >= 0 and total > 0:
            distinct = states[state, DEGREE]
            escape_per_order = escape * distinct / (total + escape * distinct)
            escape_prob = escape_per_order
            for _ in range(min(length, cap) - min(below, cap) - 1):
                escape_prob *= escape_per_order
            weight = mass * (1.0 - escape_prob) / (total + recency)
            mass *= escape_prob
            read = 0
            unread = total + recency
            while edge >= 0 and read < len(tokens) and weight * unread > needed:
                count = edges[edge, TAKEN] + (recency if read == 0 else 0.0)
                unread -= count
                token = edges[edge, TOKEN]
                child = 0
                while child < found and tokens[child] != token:
                    child += 1
                if child < found:
                    probs[child] += weight * count
                elif found < len(tokens):
                    tokens[found] = token
                    probs[found] = weight * count
                    lengths[found] = length
                    found += 1
                edge = edges[edge, NEXT]
                read += 1
        state = shorter
        length = below
        steps += 1
    return found
