"""One node of a chain in suffix-sorted segments.

Contexts and ranges are those of `segment_tree`: of each context's occurrences a sample is read once, at the
root, and the ranges of the sample shrink to the occurrences that agree with the chain as it grows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import inner_kernel
from retrieval_draft.index._kernels.segment_match import SEPARATOR, token_at
from retrieval_draft.index._kernels.segment_tree import INSIDE, effective_order

MAX_RUNS = 64
"""Runs of equal tokens that are kept separate in one context; further ones are counted, not proposed."""


@inner_kernel
def expand_segments(
    segments: NDArray[np.int64],
    pool: NDArray[np.int64],
    ranges: NDArray[np.int16],
    range_segment: NDArray[np.int64],
    range_scale: NDArray[np.float64],
    range_context: NDArray[np.int64],
    num_ranges: int,
    context_length: NDArray[np.int64],
    contexts: int,
    params: NDArray[np.float64],
    depth: int,
    needed: float,
    run_child: NDArray[np.int64],
    run_count: NDArray[np.float64],
    seen_in: NDArray[np.int64],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float64],
    lengths: NDArray[np.int32],
) -> int:
    """Tokens after the chain in its contexts' occurrences, blended by the rule of `segment_tree.propose`.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        pool: int64. Text positions after the sampled occurrences, from `segment_tree.gather`.
        ranges: int16, shape (RANGES, 2). The part of the pool that agrees with the chain, for each range.
        range_segment: int64, shape (RANGES,). Segment of each range, from `segment_tree.gather` as the next
            three.
        range_scale: float64, shape (RANGES,).
        range_context: int64, shape (RANGES,).
        num_ranges: Number of ranges.
        context_length: int64, shape (CONTEXTS + 1,).
        contexts: Number of contexts.
        params: float64: escape factor, order cap, gain beyond it.
        depth: Tokens of the chain so far.
        needed: Probability below which a child is of no use.
        run_child: int64, shape (MAX_RUNS,). Scratch.
        run_count: float64, shape (MAX_RUNS,). Scratch.
        seen_in: int64. Scratch, as long as `tokens`.
        tokens: int32, shape (children,), their limit. Written, as are the next two.
        probs: float64, shape (children,).
        lengths: int32, shape (children,). Match lengths.

    Returns:
        Children written.
    """
    escape, cap, gain = params[0], params[1], params[2]
    found = 0
    mass = 1.0
    item = 0
    for context in range(contexts):
        if mass <= needed:
            break
        runs = 0
        total = 0.0
        distinct = 0
        while item < num_ranges and range_context[item] == context:
            begin, end = np.int64(ranges[item, 0]), np.int64(ranges[item, 1])
            segment = range_segment[item]
            while begin < end:
                token = token_at(segments, segment, pool[begin] + depth)
                stop = begin + 1
                while stop < end and token_at(segments, segment, pool[stop] + depth) == token:
                    stop += 1
                count = range_scale[item] * (stop - begin)
                begin = stop
                if token == segments[segment, SEPARATOR]:
                    continue
                total += count
                child = 0
                while child < found and tokens[child] != token:
                    child += 1
                if child == found:
                    if found == len(tokens):
                        distinct += 1
                        continue
                    tokens[found] = token
                    probs[found] = 0.0
                    lengths[found] = context_length[context] + depth
                    seen_in[found] = -1
                    found += 1
                if seen_in[child] != context:
                    seen_in[child] = context
                    distinct += 1
                if runs < len(run_child):
                    run_child[runs] = child
                    run_count[runs] = count
                    runs += 1
            item += 1
        if runs == 0:
            continue
        escape_per_order = escape * distinct / (total + escape * distinct)
        below = min(depth, INSIDE)
        if depth == 0:
            below = context_length[context + 1]
        else:
            for other in range(num_ranges - 1, item - 1, -1):
                if ranges[other, 1] > ranges[other, 0]:
                    below = context_length[range_context[other]] + depth
        orders = effective_order(context_length[context] + depth, cap, gain) - effective_order(
            below, cap, gain
        )
        escape_prob = escape_per_order ** max(orders, 1.0)
        weight = mass * (1.0 - escape_prob) / total
        mass *= escape_prob
        for run in range(runs):
            probs[run_child[run]] += weight * run_count[run]
    return found


@inner_kernel
def follow_segments(
    segments: NDArray[np.int64],
    pool: NDArray[np.int64],
    ranges: NDArray[np.int16],
    range_segment: NDArray[np.int64],
    num_ranges: int,
    depth: int,
    token: int,
) -> bool:
    """Narrows each range to the occurrences with `token` next.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        pool: int64. Text positions after the sampled occurrences, from `segment_tree.gather`.
        ranges: int16, shape (RANGES, 2). Changed.
        range_segment: int64, shape (RANGES,).
        num_ranges: Number of ranges.
        depth: Tokens of the chain so far.
        token: The next one.

    Returns:
        True if any occurrence has.
    """
    left = False
    for item in range(num_ranges):
        begin, end = np.int64(ranges[item, 0]), np.int64(ranges[item, 1])
        segment = range_segment[item]
        while begin < end and token_at(segments, segment, pool[begin] + depth) != token:
            begin += 1
        stop = begin
        while stop < end and token_at(segments, segment, pool[stop] + depth) == token:
            stop += 1
        ranges[item, 0] = begin
        ranges[item, 1] = stop
        left |= stop > begin
    return left
