"""Brings each row's lookups to the end of its text, and walks the most probable chain from there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.views import int32_row, int32_rows, int64_row, prefetch
from retrieval_draft.drafting._kernels.fusion import MASK, OWN, PER_SOURCE, list_slots
from retrieval_draft.drafting.batch._kernels.adjacency_step import expand_adjacency
from retrieval_draft.drafting.batch._kernels.automaton_step import expand_automaton, follow_automaton
from retrieval_draft.drafting.batch._kernels.candidates import add_children, choose
from retrieval_draft.drafting.batch._kernels.segment_rows import advance_rows
from retrieval_draft.drafting.batch._kernels.segment_step import MAX_RUNS, expand_segments, follow_segments
from retrieval_draft.drafting.batch._kernels.slots import (
    CHAIN,
    EDGES_AT,
    INSERTED,
    LENGTH,
    META_AT,
    NUM_EDGES,
    NUM_STATES,
    PENDING,
    SLOT_MASK,
    STATES_AT,
    TABLE_AT,
    TABLE_SIZE,
    TEXT,
)
from retrieval_draft.index._kernels import automaton
from retrieval_draft.index._kernels.adjacency import ORDERS, ask_keys, ask_rows
from retrieval_draft.index._kernels.segment_match import TOKENS, WIDTH, locate
from retrieval_draft.index._kernels.segment_tree import CONTEXTS, MAX_DEPTH, POOL, RANGES, gather

CHILDREN = 24
"""Children of one source considered for one node; of the automaton half as many."""

REQUEST, SEEN = range(2)
"""Fields of `columns`: the indices of automaton and adjacency matrix among the sources; -1 if absent."""


@kernel
def relocate(
    slots: NDArray[np.int64],
    segments: NDArray[np.int64],
    moved: NDArray[np.int64],
    old_chain: NDArray[np.int32],
    old_longest: NDArray[np.int32],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
) -> None:
    """Copies every slot's lookups to another table of segments, and looks its text up in the new ones.

    Args:
        slots: int64, shape (slots,). Slots to copy.
        segments: int64, shape (segments, SEGMENT_FIELDS). The new table.
        moved: int64, shape (segments,). Index of each segment in the old table, or -1.
        old_chain: int32, shape (slots, segments before, LONGEST + 1, 2).
        old_longest: int32, shape (slots, segments before).
        chain: int32, shape (slots, segments, LONGEST + 1, 2). Written.
        longest: int32, shape (slots, segments). Written.
        tail: int32, shape (slots, LONGEST).
    """
    for slot in slots:
        for segment in range(len(segments)):
            if moved[segment] >= 0:
                chain[slot, segment] = old_chain[slot, moved[segment]]
                longest[slot, segment] = old_longest[slot, moved[segment]]
            else:
                locate(segments, segment, chain[slot], longest[slot], tail[slot])


@kernel
def propose_rows(
    ids: NDArray[np.int64],
    first_row: int,
    last_row: int,
    limits: NDArray[np.int32],
    min_prob: float,
    slots: NDArray[np.int64],
    nodes: NDArray[np.int32],
    evidence: NDArray[np.float32],
    chosen: NDArray[np.int32],
    columns: NDArray[np.int64],
    automaton_params: NDArray[np.float64],
    keys: NDArray[np.uint64],
    visits: NDArray[np.int32],
    row_tokens: NDArray[np.int32],
    row_probs: NDArray[np.float32],
    backoff: NDArray[np.float64],
    segments: NDArray[np.int64],
    group_starts: NDArray[np.int64],
    group_columns: NDArray[np.int64],
    segment_params: NDArray[np.float64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    used: int,
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    occurrences: NDArray[np.uint8],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    prior: float,
    needed: float,
    full: NDArray[np.uint8],
    out_tokens: NDArray[np.int32],
    out_lengths: NDArray[np.int32],
    out_probs: NDArray[np.float32],
) -> int:
    """Proposes for rows first_row..last_row-1. Rows are independent, so threads may split a batch.

    Args:
        ids: int64, shape (rows,).
        limits: int32, shape (rows,). The longest chain of each row.
        min_prob: Smallest path probability of a chain's node.
        slots: int64, shape (slots, SLOT_FIELDS).
        nodes: int32, shape (slots, 2, nodes). Written: tokens and parents of the proposals.
        evidence: float32, shape (slots, nodes, columns). Written.
        chosen: int32, shape (slots, max_chain). Written: nodes of each chain.
        columns: int64, shape (2,). See REQUEST and SEEN.
        keys, visits, row_tokens, row_probs, backoff: The adjacency matrix.
        automaton_params: float64, shape (3,): escape factor, order cap, recency.
        segments: int64, shape (segments, SEGMENT_FIELDS). Those of group g are
            group_starts[g]..group_starts[g + 1] - 1.
        group_starts: int64, shape (groups + 1,).
        group_columns: int64, shape (groups,). Index of each group among the sources.
        segment_params: float64, shape (4,): escape factor, order cap, gain beyond it, occurrences read for
            one context.
        chain, longest, tail: Of all slots, see `segment_match`.
        used: The set of sources that are asked, a bit mask of their slots in the calibration.
        weights, parameters, request, occurrences, expected, accepted, prior: Of the calibration.
        needed: Probability below which a child is not considered.
        full: uint8, shape (rows,). Gets 1 where a text did not fit its automaton: nothing else is done then,
            and the call is repeated for the row with more room.
        out_tokens: int32, shape (rows, max_chain). -1 after each chain.
        out_lengths: int32, shape (rows,).
        out_probs: float32, shape (rows, max_chain). Path probabilities, 0 after each chain.

    Returns:
        Rows that did not fit.
    """
    groups = len(group_columns)
    sample = np.int64(segment_params[3])
    width = out_tokens.shape[1]
    room = nodes.shape[2]
    child_token = np.empty(CHILDREN, np.int32)
    child_prob = np.empty(CHILDREN, np.float64)
    child_length = np.empty(CHILDREN, np.int32)
    run_child = np.empty(MAX_RUNS, np.int64)
    run_count = np.empty(MAX_RUNS, np.float64)
    seen_in = np.empty(CHILDREN, np.int64)
    sources = (evidence.shape[2] - OWN) // PER_SOURCE
    left = np.zeros(sources, np.float64)
    source_slots = np.empty(sources, np.int64)
    list_slots(used, source_slots)
    context = np.empty(ORDERS, np.int32)
    hashes = np.empty(ORDERS, np.uint64)
    rows = np.empty(ORDERS, np.int64)
    pool = np.empty((groups, POOL), np.int64)
    ranges = np.empty((groups, RANGES, 2), np.int16)
    range_segment = np.empty((groups, RANGES), np.int64)
    range_scale = np.empty((groups, RANGES), np.float64)
    range_context = np.empty((groups, RANGES), np.int64)
    context_length = np.empty((groups, CONTEXTS + 1), np.int64)
    num_ranges = np.zeros(groups, np.int64)
    num_contexts = np.zeros(groups, np.int64)
    misfits = 0
    advance_rows(ids, first_row, last_row, slots, segments, chain, longest, tail)
    for row in range(first_row, last_row):
        slot = ids[row] & SLOT_MASK
        full[row] = 0
        length = slots[slot, LENGTH]
        text = int32_row(slots[slot, TEXT], length)
        states = int32_rows(slots[slot, STATES_AT], slots[slot, NUM_STATES], automaton.STATE_FIELDS)
        edges = int32_rows(slots[slot, EDGES_AT], slots[slot, NUM_EDGES], automaton.EDGE_FIELDS)
        table = int32_row(slots[slot, TABLE_AT], slots[slot, TABLE_SIZE])
        meta = int64_row(slots[slot, META_AT], automaton.META_FIELDS)
        if row + 1 < last_row:
            prefetch(slots[ids[row + 1] & SLOT_MASK, META_AT])
        for back in range(ORDERS):
            position = length - ORDERS + back
            context[back] = text[position] if position >= 0 else -1
        if columns[SEEN] >= 0:
            ask_keys(keys, context, hashes)
        if columns[REQUEST] >= 0 and slots[slot, INSERTED] < length:
            slots[slot, INSERTED] = automaton.insert(states, edges, table, meta, text, slots[slot, INSERTED])
            if slots[slot, INSERTED] < length:
                full[row] = 1
                misfits += 1
                continue

        state = automaton.matched_state(states, meta)
        matched = np.int64(states[state, automaton.LENGTH])
        if columns[SEEN] >= 0:
            ask_rows(keys, row_tokens, row_probs, hashes, rows)
        for group in range(groups):
            begin, end = group_starts[group], group_starts[group + 1]
            num_contexts[group] = 0
            if end > begin and limits[row] > 0:
                num_ranges[group], num_contexts[group] = gather(
                    segments[begin:end], chain[slot, begin:end], longest[slot, begin:end], tail[slot],
                    pool[group], ranges[group], range_segment[group], range_scale[group],
                    range_context[group], context_length[group], sample,
                )  # fmt: skip
                for item in range(num_ranges[group]):
                    segment = begin + range_segment[group, item]
                    tokens_at, token_width = segments[segment, TOKENS], segments[segment, WIDTH]
                    for index in range(ranges[group, item, 0], ranges[group, item, 1]):
                        prefetch(tokens_at + token_width * pool[group, index])

        size = np.int64(1)  # literals would compile the callees twice
        node = np.int64(0)
        path = 1.0
        depth = np.int64(0)
        nodes[slot, 1, 0] = -1
        evidence[slot, 0, MASK] = used
        while depth < limits[row]:
            first = size
            least = needed
            if columns[REQUEST] >= 0:
                left[columns[REQUEST]] = 0.0
                if state > 0:
                    found = expand_automaton(
                        states, edges, state, matched, automaton_params, least,
                        child_token[: CHILDREN // 2], child_prob, child_length,
                    )  # fmt: skip
                    size = add_children(
                        columns[REQUEST], source_slots[columns[REQUEST]], found, child_token, child_prob,
                        child_length, least, first, size, nodes[slot, 0], evidence[slot], left,
                    )  # fmt: skip
            if columns[SEEN] >= 0:
                found = expand_adjacency(
                    visits, row_tokens, row_probs, backoff, rows, least, child_token, child_prob, child_length
                )  # fmt: skip
                size = add_children(
                    columns[SEEN], source_slots[columns[SEEN]], found, child_token, child_prob,
                    child_length, least, first, size, nodes[slot, 0], evidence[slot], left,
                )  # fmt: skip
            for group in range(groups):
                left[group_columns[group]] = 0.0
                if num_contexts[group] > 0 and depth < MAX_DEPTH:
                    begin, end = group_starts[group], group_starts[group + 1]
                    found = expand_segments(
                        segments[begin:end], pool[group], ranges[group], range_segment[group],
                        range_scale[group], range_context[group], num_ranges[group], context_length[group],
                        num_contexts[group], segment_params, depth, least, run_child, run_count, seen_in,
                        child_token, child_prob, child_length,
                    )  # fmt: skip
                    size = add_children(
                        group_columns[group], source_slots[group_columns[group]], found, child_token,
                        child_prob, child_length, least, first, size, nodes[slot, 0], evidence[slot], left,
                    )  # fmt: skip
            if size == first:
                break
            for candidate in range(first, size):
                nodes[slot, 1, candidate] = node
            node, prob = choose(
                first, size, depth + 1, nodes[slot, 0], evidence[slot], left, source_slots, weights,
                parameters, request[slot], occurrences[slot], expected, accepted, prior,
            )  # fmt: skip
            path *= prob
            if path < min_prob:
                break
            token = nodes[slot, 0, node]
            chosen[slot, depth] = node
            out_tokens[row, depth] = token
            out_probs[row, depth] = path
            if size == room:
                depth += 1
                break
            if columns[SEEN] >= 0:
                for back in range(ORDERS - 1):
                    context[back] = context[back + 1]
                context[ORDERS - 1] = token
                ask_keys(keys, context, hashes)
            state, matched = follow_automaton(states, edges, table, state, matched, token)
            for group in range(groups):
                if num_contexts[group] > 0 and depth < MAX_DEPTH:
                    begin, end = group_starts[group], group_starts[group + 1]
                    if not follow_segments(
                        segments[begin:end], pool[group], ranges[group], range_segment[group],
                        num_ranges[group], depth, token,
                    ):  # fmt: skip
                        num_contexts[group] = 0
            if columns[SEEN] >= 0:
                ask_rows(keys, row_tokens, row_probs, hashes, rows)
            depth += 1
        slots[slot, PENDING] = size
        slots[slot, CHAIN] = depth
        out_lengths[row] = depth
        for column in range(depth, width):
            out_tokens[row, column] = -1
            out_probs[row, column] = 0.0
    return misfits
