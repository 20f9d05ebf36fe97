"""Suffix automaton over int32 arrays: insertion with counts and recency, and edges by token.

Layout, one row an item, so that a visit touches one cache line:

    states[s] = link, length, count, last_end, first_edge, degree
    edges[e]  = source, token, target, next_edge, previous_edge, count
    table[h]  = an edge, or -1; open addressing, holds only the edges of states with more than SMALL of them
    meta      = states, edges, tokens, last state, edges in the table, and the sizes of the arrays
                that the token which did not fit needs

State 0 is the root. The strings of a state end at the same positions (Blumer et al., 1985), so following an
edge from any of them leads to the same state. Counts are of occurrences that are followed by a token, so the
end of the text, which no token follows yet, is in none of them: ``edges[e].count`` is the number of times the
token followed, ``states[s].count`` their sum. The first edge of a list is the one taken last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.index.source import TokenArray

LINK, LENGTH, COUNT, LAST_END, FIRST_EDGE, DEGREE = range(6)
STATE_FIELDS = 6
SOURCE, TOKEN, TARGET, NEXT, PREVIOUS, TAKEN = range(6)
EDGE_FIELDS = 6
STATES, EDGES, TOKENS, LAST, TABLED, NEED_STATES, NEED_EDGES, NEED_TABLE = range(8)
META_FIELDS = 8

SMALL = 4
"""A state with at most this many edges is searched by its list, one with more in the table."""

WALK = 64
"""Suffix links along which one insertion counts; a run of one token has a chain as long as itself."""


@kernel
def slot_of(source: int, token: int, mask: int) -> int:
    """First table slot for an edge: a multiplicative hash of (source, token)."""
    mixed = np.uint64(source) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(token) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((mixed >> np.uint64(20)) & np.uint64(mask))


@kernel
def find_edge(
    states: NDArray[np.int32], edges: NDArray[np.int32], table: NDArray[np.int32], state: int, token: int
) -> int:
    """The edge of `state` labelled `token`, or -1.

    Args:
        states: int32, shape (room, STATE_FIELDS).
        edges: int32, shape (room, EDGE_FIELDS).
        table: int32, shape (size,), a power of two.
        state: Index of the state.
        token: Label of the edge.
    """
    if states[state, DEGREE] <= SMALL:
        edge = states[state, FIRST_EDGE]
        while edge >= 0 and edges[edge, TOKEN] != token:
            edge = edges[edge, NEXT]
        return edge
    mask = len(table) - 1
    slot = slot_of(state, token, mask)
    while True:
        edge = table[slot]
        if edge < 0 or (edges[edge, SOURCE] == state and edges[edge, TOKEN] == token):
            return edge
        slot = (slot + 1) & mask


@kernel
def _enter(edges: NDArray[np.int32], table: NDArray[np.int32], meta: NDArray[np.int64], edge: int) -> None:
    mask = len(table) - 1
    slot = slot_of(edges[edge, SOURCE], edges[edge, TOKEN], mask)
    while table[slot] >= 0:
        slot = (slot + 1) & mask
    table[slot] = edge
    meta[TABLED] += 1


@kernel
def rebuild_table(
    edges: NDArray[np.int32], table: NDArray[np.int32], meta: NDArray[np.int64], states: NDArray[np.int32]
) -> None:
    """Fills an empty `table` with the edges of every state that has more than SMALL.

    Args:
        edges: int32, shape (room, EDGE_FIELDS).
        table: int32, shape (size,), a power of two, all -1. Written.
        meta: int64, shape (META_FIELDS,). Changed.
        states: int32, shape (room, STATE_FIELDS).
    """
    meta[TABLED] = 0
    for edge in range(meta[EDGES]):
        if states[edges[edge, SOURCE], DEGREE] > SMALL:
            _enter(edges, table, meta, edge)


@kernel
def _add_edge(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    table: NDArray[np.int32],
    meta: NDArray[np.int64],
    state: int,
    token: int,
    target: int,
    count: int,
) -> None:
    edge = meta[EDGES]
    meta[EDGES] = edge + 1
    first = states[state, FIRST_EDGE]
    edges[edge, SOURCE] = state
    edges[edge, TOKEN] = token
    edges[edge, TARGET] = target
    edges[edge, NEXT] = first
    edges[edge, PREVIOUS] = -1
    edges[edge, TAKEN] = count
    if first >= 0:
        edges[first, PREVIOUS] = edge
    states[state, FIRST_EDGE] = edge
    degree = states[state, DEGREE] + 1
    states[state, DEGREE] = degree
    if degree == SMALL + 1:
        while edge >= 0:
            _enter(edges, table, meta, edge)
            edge = edges[edge, NEXT]
    elif degree > SMALL:
        _enter(edges, table, meta, edge)


@kernel
def _move_to_front(states: NDArray[np.int32], edges: NDArray[np.int32], edge: int) -> None:
    state = edges[edge, SOURCE]
    first = states[state, FIRST_EDGE]
    if first == edge:
        return
    after = edges[edge, NEXT]
    edges[edges[edge, PREVIOUS], NEXT] = after
    if after >= 0:
        edges[after, PREVIOUS] = edges[edge, PREVIOUS]
    edges[edge, PREVIOUS] = -1
    edges[edge, NEXT] = first
    edges[first, PREVIOUS] = edge
    states[state, FIRST_EDGE] = edge


@kernel
def _new_state(states: NDArray[np.int32], meta: NDArray[np.int64], length: int) -> int:
    state = meta[STATES]
    meta[STATES] = state + 1
    states[state, LINK] = 0
    states[state, LENGTH] = length
    states[state, COUNT] = 0
    states[state, LAST_END] = -1
    states[state, FIRST_EDGE] = -1
    states[state, DEGREE] = 0
    return state


@kernel
def _clone(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    table: NDArray[np.int32],
    meta: NDArray[np.int64],
    original: int,
    parent: int,
    token: int,
) -> int:
    """Splits the strings of `original` no longer than ``parent + token`` off into a state of their own."""
    clone = _new_state(states, meta, states[parent, LENGTH] + 1)
    states[clone, LINK] = states[original, LINK]
    states[clone, COUNT] = states[original, COUNT]
    states[clone, LAST_END] = states[original, LAST_END]
    tail = states[original, FIRST_EDGE]
    while tail >= 0 and edges[tail, NEXT] >= 0:
        tail = edges[tail, NEXT]
    while tail >= 0:  # from the back, since an added edge goes to the front: this keeps the order
        _add_edge(
            states, edges, table, meta, clone, edges[tail, TOKEN], edges[tail, TARGET], edges[tail, TAKEN]
        )
        tail = edges[tail, PREVIOUS]
    states[original, LINK] = clone
    while parent >= 0:
        edge = find_edge(states, edges, table, parent, token)
        if edge < 0 or edges[edge, TARGET] != original:
            break
        edges[edge, TARGET] = clone
        parent = states[parent, LINK]
    return clone


@kernel
def insert(
    states: NDArray[np.int32],
    edges: NDArray[np.int32],
    table: NDArray[np.int32],
    meta: NDArray[np.int64],
    tokens: TokenArray,
    start: int,
    lowest: int = -1,
) -> int:
    """Appends ``tokens[start:]`` to the current text.

    Stops early when an array could overflow on the next token; the caller grows it and calls again. A token
    of -1 ends the current text: later tokens do not continue it.

    Args:
        states: int32, shape (room, STATE_FIELDS). Changed, as are the next three.
        edges: int32, shape (room, EDGE_FIELDS).
        table: int32, shape (size,), a power of two.
        meta: int64, shape (META_FIELDS,).
        tokens: int32, shape (length,).
        start: Index of the first one to append.
        lowest: Smallest valid token: 0 where no text may end.

    Returns:
        Number of tokens appended; ``len(tokens)`` for all. -1 where one is not valid: none was appended.
    """
    for index in range(start, len(tokens)):
        if tokens[index] < lowest:
            return -1
    for index in range(start, len(tokens)):
        token = tokens[index]
        last = meta[LAST]
        if token < 0:
            meta[LAST] = 0
            meta[TOKENS] += 1
            continue
        parent = last
        more_edges = 0
        more_tabled = 0
        edge = find_edge(states, edges, table, parent, token)
        while edge < 0:
            more_edges += 1
            if states[parent, DEGREE] >= SMALL:
                more_tabled += SMALL + 1 if states[parent, DEGREE] == SMALL else 1
            parent = states[parent, LINK]
            if parent < 0:
                break
            edge = find_edge(states, edges, table, parent, token)
        target = -1
        if edge >= 0:
            target = edges[edge, TARGET]
            if states[parent, LENGTH] + 1 != states[target, LENGTH]:
                # One more than it has now: it may be on the suffix path itself and get an edge first.
                more_edges += states[target, DEGREE] + 1
                more_tabled += states[target, DEGREE] + 1
        meta[NEED_STATES] = meta[STATES] + 2
        meta[NEED_EDGES] = meta[EDGES] + more_edges
        meta[NEED_TABLE] = 2 * (meta[TABLED] + more_tabled)
        if meta[NEED_STATES] > len(states) or meta[NEED_EDGES] > len(edges) or meta[NEED_TABLE] > len(table):
            return index

        position = meta[TOKENS]
        meta[TOKENS] = position + 1
        current = -1
        if parent != last:
            current = _new_state(states, meta, states[last, LENGTH] + 1)
            state = last
            while state != parent:
                _add_edge(states, edges, table, meta, state, token, current, 1)
                states[state, COUNT] += 1
                states[state, LAST_END] = position - 1
                state = states[state, LINK]
        if edge >= 0:
            if states[parent, LENGTH] + 1 != states[target, LENGTH]:
                target = _clone(states, edges, table, meta, target, parent, token)
            if current < 0:
                current = target  # only after a text end: the string has a state already
            else:
                states[current, LINK] = target
        meta[LAST] = current

        # Shorter suffixes have been followed by this token before: count once more, along a bounded path.
        steps = 0
        while parent >= 0 and steps < WALK:
            edge = find_edge(states, edges, table, parent, token)
            edges[edge, TAKEN] += 1
            _move_to_front(states, edges, edge)
            states[parent, COUNT] += 1
            states[parent, LAST_END] = position - 1
            parent = states[parent, LINK]
            steps += 1
    return len(tokens)


@kernel
def matched_state(states: NDArray[np.int32], meta: NDArray[np.int64]) -> int:
    """The state of the longest suffix that was followed by a token earlier; the root if none was.

    The whole text's own state counts only if another text holds it, since no token follows its end yet.

    Args:
        states: int32, shape (room, STATE_FIELDS).
        meta: int64, shape (META_FIELDS,).
    """
    state = meta[LAST]
    while state > 0 and states[state, FIRST_EDGE] < 0:
        state = states[state, LINK]
    return state
