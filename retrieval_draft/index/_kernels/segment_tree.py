"""Best-first draft trees from the tokens after the text's end in suffix-sorted segments.

The contexts are the lengths of the end that occur, longest first; a length whose occurrences are those of
the longer one is no context of its own. Of each context's occurrences at most SAMPLE are read, spread
evenly over its interval, so their continuations are in order and a prefix of them is a range. A node of the
tree is one range for each context and segment, and its children are the runs of equal tokens in these ranges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.heap import BUCKETS, CUT, THRESHOLDS, admit, pop
from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.memory import load_int32
from retrieval_draft.index._kernels.segment_match import (
    LONGEST,
    SEPARATOR,
    SINGLE,
    SUFFIXES,
    occurrences,
    token_at,
)
from retrieval_draft.index._kernels.suffix_sort import DEPTH

CHILDREN = 24
"""Candidates that a node may add, on average; a node with more uses the share of those with fewer."""

CONTEXTS = 3
"""Contexts blended."""

RANGES = 24
"""Ranges of one node: contexts times the segments that hold them."""

SAMPLE = 32
"""Occurrences read for one context."""

POOL = CONTEXTS * SAMPLE + RANGES

MAX_DEPTH = DEPTH - LONGEST
"""Levels of a tree: deeper the continuations would not be in order."""

INSIDE = 3
"""Length up to which ends of a path that only one context holds are assumed to occur elsewhere too, so that
the context does not count for them. On the traces 2 to 6 differ by less than 0.3%."""

ENOUGH = 256
"""Occurrences of a context from which on shorter ones are left out."""


@kernel
def propose(
    segments: NDArray[np.int64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    params: NDArray[np.float64],
    budget: int,
    work_range: NDArray[np.int16],
    work_int: NDArray[np.int32],
    work_float: NDArray[np.float64],
    work_bits: NDArray[np.int64],
    heap: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    lengths: NDArray[np.int32],
) -> int:
    """Best-first tree over the blended counts of all contexts, by the rule of the automaton's tree.

    Args:
        segments, chain, longest, tail: As `segment_match.advance` left them.
        params: float64, shape (3,): escape factor, order cap, gain beyond it.
        work_range: int16, shape (candidates + 1, RANGES, 2): ranges of the pool; the last row is the root's.
        work_int: int32, shape (candidates, 4): parent node, token, depth, match length.
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
    cap = params[1]
    gain = params[2]
    pool = np.empty(POOL, np.int64)
    range_segment = np.empty(RANGES, np.int64)
    range_scale = np.empty(RANGES, np.float64)
    range_context = np.empty(RANGES, np.int64)
    context_length = np.empty(CONTEXTS + 1, np.int64)
    if budget <= 0 or len(segments) == 0:
        return 0
    root = len(work_range) - 1
    ranges, contexts = gather(
        segments, chain, longest, tail, pool, work_range[root], range_segment, range_scale,
        range_context, context_length, SAMPLE,
    )  # fmt: skip
    if contexts == 0:
        return 0

    found_token = np.empty(POOL, np.int64)
    found_prob = np.empty(POOL, np.float64)
    found_length = np.empty(POOL, np.int64)
    found_begin = np.empty((POOL, RANGES), np.int16)
    found_end = np.empty((POOL, RANGES), np.int16)
    run_child = np.empty(POOL, np.int64)
    run_count = np.empty(POOL, np.float64)
    histogram = np.zeros(BUCKETS, np.int64)
    path_probs = work_float[0]
    path_bits = work_bits[0]
    cut = np.zeros(2, np.int64)
    nodes = 0
    candidates = 0
    waiting = 0
    path = 1.0
    node = -1
    depth = 0
    row = root
    while True:
        needed = THRESHOLDS[cut[CUT]]
        found = 0
        mass = 1.0
        item = 0
        for context in range(contexts):
            if mass * path <= needed or depth >= MAX_DEPTH:
                break
            runs = 0
            total = 0.0
            distinct = 0
            fresh = found  # children below it came from longer contexts
            while item < ranges and range_context[item] == context:
                begin, end = work_range[row, item, 0], work_range[row, item, 1]
                segment = range_segment[item]
                separator = segments[segment, SEPARATOR]
                while begin < end:
                    token = token_at(segments, segment, pool[begin] + depth)
                    stop = begin + 1
                    while stop < end and token_at(segments, segment, pool[stop] + depth) == token:
                        stop += 1
                    if token != separator:
                        child = 0
                        while child < found and found_token[child] != token:
                            child += 1
                        if child == found:
                            found_token[found] = token
                            found_prob[found] = 0.0
                            found_length[found] = context_length[context] + depth
                            for other in range(ranges):
                                found_begin[found, other] = 0
                                found_end[found, other] = 0
                            found += 1
                        found_begin[child, item] = begin
                        found_end[child, item] = stop
                        run_child[runs] = child
                        run_count[runs] = range_scale[item] * (stop - begin)
                        total += run_count[runs]
                        runs += 1
                    begin = stop
                item += 1
            if runs == 0:
                continue
            # A child in two segments is one of the distinct children, found in several runs.
            distinct = found - fresh
            for run in range(runs):
                if run_child[run] < fresh:
                    again = False
                    for other in range(run):
                        again |= run_child[other] == run_child[run]
                    if not again:
                        distinct += 1
            escape_per_order = escape * distinct / (total + escape * distinct)
            # It counts for all lengths down to the next context that holds this path.
            below = min(depth, INSIDE)
            if depth == 0:
                below = context_length[context + 1]
            else:
                for other in range(ranges - 1, item - 1, -1):
                    if work_range[row, other, 1] > work_range[row, other, 0]:
                        below = context_length[range_context[other]] + depth
            orders = effective_order(context_length[context] + depth, cap, gain) - effective_order(
                below, cap, gain
            )
            escape_prob = escape_per_order ** max(orders, 1.0)
            weight = mass * (1.0 - escape_prob) / total
            mass *= escape_prob
            for run in range(runs):
                found_prob[run_child[run]] += weight * run_count[run]
        for child in range(found):
            prob = min(found_prob[child], 0.999)
            if prob * path <= needed or candidates == len(path_probs):
                continue
            path_probs[candidates] = prob * path
            if not admit(candidates, path_probs, path_bits, heap, waiting, histogram, cut, budget):
                continue
            work_int[candidates, 0] = node
            work_int[candidates, 1] = found_token[child]
            work_int[candidates, 2] = depth + 1
            work_int[candidates, 3] = found_length[child]
            for other in range(ranges):
                work_range[candidates, other, 0] = found_begin[child, other]
                work_range[candidates, other, 1] = found_end[child, other]
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
        depth = work_int[best, 2]
        lengths[node] = work_int[best, 3]
        probs[node] = work_float[1, best]
        path = path_probs[best]
        row = best
        if nodes == budget:
            return nodes


@kernel
def effective_order(length: int, cap: float, gain: float) -> float:
    """Context lengths that a match of `length` tokens counts for: each up to the cap, fewer beyond."""
    if length <= cap:
        return float(length)
    return cap + gain * np.log2(length / cap)


@kernel
def gather(
    segments: NDArray[np.int64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    pool: NDArray[np.int64],
    root_ranges: NDArray[np.int16],
    range_segment: NDArray[np.int64],
    range_scale: NDArray[np.float64],
    range_context: NDArray[np.int64],
    context_length: NDArray[np.int64],
    sample: int,
) -> tuple[int, int]:
    """Collects the positions after the contexts' occurrences, `sample` of each context at most.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        chain: int32, shape (segments, LONGEST + 1, 2). Unknown entries are looked up.
        longest: int32, shape (segments,).
        tail: int32, shape (LONGEST,).
        pool: int64, shape (POOL,). Written: positions in the segments' texts, range by range.
        root_ranges: int16, shape (RANGES, 2). Written: begin and end of each range in the pool.
        range_segment: int64, shape (RANGES,). Written: segment of each range.
        range_scale: float64, shape (RANGES,). Written: occurrences for each sampled one.
        range_context: int64, shape (RANGES,). Written: context of each range.
        context_length: int64, shape (CONTEXTS + 1,). Written.
        sample: Occurrences of one context to read.

    Returns:
        Ranges, and contexts. ``context_length[c]`` is the length of context c, and one entry more that of the
        next shorter one with other occurrences, or 0.
    """
    # Ends shorter than a key are looked up here first, and `longest` is 0 for them. A bare 3 would have numba
    # compile all that it is passed to twice: for the literal, and for any integer.
    length = np.int64(3)
    for segment in range(len(segments)):
        length = max(length, longest[segment])
    contexts = 0
    ranges = 0
    pooled = 0
    before = 0
    while length > 0:
        total = 0
        for segment in range(len(segments)):
            total += occurrences(segments, segment, chain, longest, tail, length)
        if total > before:
            context_length[contexts] = length
            if contexts == CONTEXTS or before >= ENOUGH:
                return ranges, contexts
            rate = min(1.0, sample / total)
            for segment in range(len(segments) - 1, -1, -1):
                size = occurrences(segments, segment, chain, longest, tail, length)
                if size == 0 or ranges == RANGES:
                    continue
                taken = min(size, max(1, int(size * rate)))
                if pooled + taken > POOL:
                    continue
                range_segment[ranges] = segment
                range_scale[ranges] = size / taken
                range_context[ranges] = contexts
                root_ranges[ranges, 0] = pooled
                first = np.int64(chain[segment, length, 0])
                if chain[segment, length, 1] == SINGLE:
                    pool[pooled] = first + length
                    pooled += 1
                else:
                    for item in range(taken):
                        # The middle of each of `taken` equal parts.
                        rank = first + ((2 * item + 1) * size) // (2 * taken)
                        pool[pooled] = load_int32(segments[segment, SUFFIXES], rank) + length
                        pooled += 1
                root_ranges[ranges, 1] = pooled
                ranges += 1
            contexts += 1
            before = total
        length -= 1
    context_length[contexts] = 0
    return ranges, contexts
