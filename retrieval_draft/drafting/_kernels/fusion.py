"""Union of proposals into one trie, its best nodes, and learning from the outcome of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.heap import pop, push
from retrieval_draft._kernels.jit import kernel
from retrieval_draft.drafting._kernels.sharpen import COLUMNS, sharpen, teach_sharpness

SOURCES = 12
MASKS = 1 << SOURCES
"""Slots of sources in a calibration; a set of sources is a bit mask of their slots."""

BINS = 16
CELLS = MASKS * BINS
"""A calibration cell is the set of sources that named a node, and a bin of the log odds they give it."""

LENGTHS = 10
DEPTHS = 8
RANKS = 5
"""Buckets of match length, of depth, and of the rank among a source's guesses below one parent."""

LENGTH_SCALE = 0
LENGTH_BIAS = LENGTH_SCALE + LENGTHS
DEPTH_BIAS = LENGTH_BIAS + LENGTHS
RANK_BIAS = DEPTH_BIAS + DEPTHS
ABSENT = RANK_BIAS + RANKS
TIMES_BIAS = ABSENT + 2
TIMES = 4
PARAMETERS = TIMES_BIAS + TIMES
"""Columns of a source's own parameters, by kind. The weight of a source that guesses otherwise is kept
separately for nodes that a model named. Tokens that occur 0, 1, 2 and more times in the request's text have a
bias each."""

COUNTERS = 1 << 16
"""Counters of tokens in a request's text; ids that differ by a multiple share one."""

MODEL = 6
"""The slot of draft models."""

MASK, RAW, CELL, RANK, DEPTH, TIME, NOISE = range(7)
OWN = NOISE + COLUMNS
ODDS, LENGTH, LEFT = range(3)
PER_SOURCE = 3
"""Columns of a node's evidence: the set of sources that named it, their mixed log odds, the cell of these,
rank, depth, how often its token occurs in the request's text, and the columns of the noise. Then, from OWN
on, PER_SOURCE for each source in use, in the order of their slots: its log odds, the bucket of its match
length, and, where it named siblings but not this node, the log of the probability it left over. So a node
costs what the sources in use cost, not all slots. MASK of the root is the set of sources in use; the rest
of its row is 0."""

LEARNS_LENGTH, LEARNS_DEPTH, LEARNS_RANK, LEARNS_ABSENT, LEARNS_REQUEST, LEARNS_CELLS, LEARNS_TIMES = range(7)
SWITCHES = 7
"""Number of kinds of terms, each with a switch, 1 or 0: all are learned, except to measure the value of
one."""

MAX_DEPTH = 1 << 20
"""Limit of depths."""

CERTAIN = 0.999
UNLIKELY = 1e-6
LEAST_LEFT = 0.001
MAX_WEIGHT = 2.0
LEAST_WEIGHT = 1e-6
TIMES_RATE = 3.0
"""Ratio of the learning rate of a token's occurrences to that of other terms."""


@kernel
def guess(prob: float) -> float:
    """A probability within UNLIKELY and CERTAIN; the former for NaN."""
    if not prob > UNLIKELY:
        return UNLIKELY
    return min(prob, CERTAIN)


@kernel
def log_odds(prob: float) -> float:
    """Log odds of a probability, kept finite."""
    kept = guess(prob)
    return np.log(kept / (1.0 - kept))


@kernel
def index_in(value: float, size: int) -> int:
    """A number as an index below `size`: the nearest one, 0 for NaN."""
    if not value > 0.0:
        return 0
    return int(min(value, size - 1.0))


@kernel
def list_slots(used: int, slots: NDArray[np.int64]) -> None:
    """Writes the slots of a set of sources, ascending.

    Example:
        0b100101  ->  [0, 2, 5]
    """
    count = 0
    for slot in range(SOURCES):
        if used >> slot & 1 and count < len(slots):
            slots[count] = slot
            count += 1


@kernel
def count_tokens(tokens: NDArray[np.int32], occurrences: NDArray[np.uint8]) -> None:
    """Adds a request's tokens, int32, shape (n,), to counters, uint8, shape (COUNTERS,), up to TIMES - 1.

    Example:
        tokens 7 8 7 7 7 7  ->  3 at 7, 1 at 8
    """
    for token in tokens:
        counter = np.int64(token) & (COUNTERS - 1)
        occurrences[counter] = min(np.int64(occurrences[counter]) + 1, TIMES - 1)


@kernel
def times_of(occurrences: NDArray[np.uint8], token: int) -> int:
    """Occurrences of a token in the request's text, TIMES - 1 for more, from `count_tokens`."""
    return np.int64(occurrences[np.int64(token) & (COUNTERS - 1)])


@kernel
def cell_of(mask: int, odds: float) -> int:
    """The calibration cell of a node that the sources in `mask` give these log odds together."""
    return mask * BINS + index_in(odds * 1.5 + BINS / 2, BINS)


@kernel
def length_bucket(length: int) -> int:
    """0 to 4 as they are, then 5-6, 7-9, 10-15, 16-31 and longer."""
    if length < 5:
        return max(length, 0)
    if length < 7:
        return 5
    if length < 10:
        return 6
    if length < 16:
        return 7
    return 8 if length < 32 else 9


@kernel
def depth_bucket(depth: int) -> int:
    """1 to 4, then 5-6, 7-10, 11-20 and deeper."""
    if depth < 5:
        return max(depth - 1, 0)
    if depth < 7:
        return 4
    if depth < 11:
        return 5
    return 6 if depth < 21 else 7


@kernel
def total_weight(mask: int, weights: NDArray[np.float64]) -> float:
    """Sum of the weights, float64, shape (MASKS, SOURCES + 1), of the sources in `mask`; not 0."""
    total = LEAST_WEIGHT
    for slot in range(SOURCES):
        if mask >> slot & 1:
            total += weights[mask, slot]
    return total


@kernel
def mixed_odds(
    evidence: NDArray[np.float32],
    slots: NDArray[np.int64],
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
) -> float:
    """Log odds that a node is accepted if its parent is.

    A sum of the sources' log odds, weighted by their set and scaled by match length; of a bias of the set; of
    the naming sources' biases by match length, depth, rank, occurrences and request, each by its weight; and
    of the probability that the sources that named siblings only left over for it.

    Args:
        evidence: float32, shape (columns,). A node's.
        slots: int64, shape (sources,). Of the sources in use, ascending; all the others have no part in it.
        weights: float64, shape (MASKS, SOURCES + 1).
        parameters: float64, shape (SOURCES, PARAMETERS).
        request: float64, shape (SOURCES,).
    """
    mask = index_in(evidence[MASK], MASKS)
    depth = depth_bucket(index_in(evidence[DEPTH], MAX_DEPTH))
    rank = index_in(evidence[RANK], RANKS)
    times = TIMES_BIAS + index_in(evidence[TIME], TIMES)
    absent = ABSENT + (mask >> MODEL & 1)
    odds = weights[mask, SOURCES]
    biases = 0.0
    total = LEAST_WEIGHT
    own = OWN
    for column in range(len(slots)):
        slot = slots[column]
        if mask >> slot & 1:
            weight = weights[mask, slot]
            total += weight
            bucket = index_in(evidence[own + LENGTH], LENGTHS)
            odds += weight * (1.0 + parameters[slot, LENGTH_SCALE + bucket]) * evidence[own + ODDS]
            bias = parameters[slot, LENGTH_BIAS + bucket]
            bias += parameters[slot, DEPTH_BIAS + depth]
            bias += parameters[slot, RANK_BIAS + rank]
            bias += parameters[slot, times]
            bias += request[slot]
            biases += weight * bias
        else:
            odds += parameters[slot, absent] * evidence[own + LEFT]
        own += PER_SOURCE
    return odds + biases / total


@kernel
def teach(
    evidence: NDArray[np.float32],
    error: float,
    rate: float,
    request_rate: float,
    used: int,
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    switches: NDArray[np.float64],
) -> None:
    """One step of logistic regression: moves every term of `mixed_odds` along its gradient.

    The share of a bias is treated as a constant.

    Args:
        evidence: float32, shape (columns,). A node's.
        error: Outcome, 0 or 1, minus probability.
        rate: Learning rate.
        request_rate: Learning rate of `request`.
        used: The set of sources in use.
        weights: float64, shape (MASKS, SOURCES + 1). Changed, as are the next two.
        parameters: float64, shape (SOURCES, PARAMETERS).
        request: float64, shape (SOURCES,).
        switches: float64, shape (kinds,), 1 or 0. Kinds of terms that are learned.
    """
    mask = index_in(evidence[MASK], MASKS)
    depth = depth_bucket(index_in(evidence[DEPTH], MAX_DEPTH))
    rank = index_in(evidence[RANK], RANKS)
    times = TIMES_BIAS + index_in(evidence[TIME], TIMES)
    total = total_weight(mask, weights)
    absent = ABSENT + (mask >> MODEL & 1)
    step = rate * error
    weights[mask, SOURCES] += step
    own = OWN
    for slot in range(SOURCES):
        if not used >> slot & 1:
            continue
        if mask >> slot & 1:
            weight = weights[mask, slot]
            share = weight / total
            odds_step = step * evidence[own + ODDS]
            bucket = index_in(evidence[own + LENGTH], LENGTHS)
            scale = 1.0 + parameters[slot, LENGTH_SCALE + bucket]
            weights[mask, slot] = min(max(weight + scale * odds_step, 0.0), MAX_WEIGHT)
            parameters[slot, LENGTH_SCALE + bucket] += switches[LEARNS_LENGTH] * weight * odds_step
            parameters[slot, LENGTH_BIAS + bucket] += switches[LEARNS_LENGTH] * share * step
            parameters[slot, DEPTH_BIAS + depth] += switches[LEARNS_DEPTH] * share * step
            parameters[slot, RANK_BIAS + rank] += switches[LEARNS_RANK] * share * step
            parameters[slot, times] += switches[LEARNS_TIMES] * TIMES_RATE * share * step
            request[slot] += switches[LEARNS_REQUEST] * request_rate * share * error
        else:
            moved = parameters[slot, absent] + switches[LEARNS_ABSENT] * step * evidence[own + LEFT]
            parameters[slot, absent] = min(max(moved, 0.0), MAX_WEIGHT)
        own += PER_SOURCE


@kernel
def fuse(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    lengths: NDArray[np.int32],
    starts: NDArray[np.int64],
    columns: NDArray[np.int64],
    used: int,
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    occurrences: NDArray[np.uint8],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    prior: float,
    budget: int,
    root_token: int,
    sample_key: np.uint64,
    position: int,
    vocabulary: int,
    sharpness: NDArray[np.float64],
    out_nodes: NDArray[np.int32],
    out_probs: NDArray[np.float32],
    out_sources: NDArray[np.int64],
    out_evidence: NDArray[np.float32],
) -> int:
    """Merges proposals into a trie and writes its root and `budget` most probable nodes, best first.

    The estimates of a node's sources are mixed in log odds (`mixed_odds`). The ratio of its cell then
    corrects the result by the acceptance in similar cases. A parent is at least as probable as its child and
    has the smaller number, so the order (path probability down, number up) is prefix-closed under ties.

    Args:
        tokens: int32, shape (total,). All proposals one after the other.
        parents: int32, shape (total,). Within each proposal, -1 for the root.
        probs: float32, shape (total,).
        lengths: int32, shape (total,). Match lengths.
        starts: int64, shape (proposals + 1,).
        columns: int64, shape (proposals,). Index of each proposal's source among those in use.
        used: The set of sources in use.
        weights: float64, shape (MASKS, SOURCES + 1). Of each source's log odds, and 1's, by set of sources.
        parameters: float64, shape (SOURCES, PARAMETERS). Of single sources.
        request: float64, shape (SOURCES,). Bias of each source in this request.
        occurrences: uint8, shape (COUNTERS,). From `count_tokens`.
        expected: float64, shape (CELLS,). Sum of estimates seen so far.
        accepted: float64, shape (CELLS,). Number of accepted ones among them.
        prior: Expected acceptances that each cell starts with, all of them met.
        root_token: The root's.
        sample_key: Of the noise that the target draws with.
        position: Of the first drafted token in the text; -1 where there is no noise.
        vocabulary: Ids that noise is drawn for.
        sharpness: float64, shape (MASKS, 2). Weight and bias of the noise, by set of sources.
        out_nodes: int32, shape (3, budget + 1). Tokens, parents, depths.
        out_probs: float32, shape (2, budget + 1). Probability given the parent, path probability.
        out_sources: int64. Bit s where proposal s named the node.
        out_evidence: float32, shape (budget + 1, OWN + PER_SOURCE * sources).

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
    trie_named = np.zeros(total + 1, np.int64)
    sources = (out_evidence.shape[1] - OWN) // PER_SOURCE
    evidence = np.zeros((total + 1, out_evidence.shape[1]), np.float32)
    covered = np.zeros((total + 1, sources), np.float32)
    left = np.empty(sources, np.float32)  # log of the probability that a source's children leave over
    children = np.zeros((total + 1, sources), np.int32)
    slots = np.empty(sources, np.int64)
    list_slots(used, slots)
    node_of = np.empty(total, np.int32)
    # Nodes by parent and token, hashed; 0 for none. The root may have a hundred children.
    entries = 4
    while entries < 2 * total:
        entries *= 2
    table = np.zeros(entries, np.int32)
    size = 1
    for source in range(len(starts) - 1):
        start = starts[source]
        column = min(max(columns[source], 0), sources - 1)
        bit = np.int64(1) << slots[column]
        own = OWN + PER_SOURCE * column
        for item in range(start, starts[source + 1]):
            above = parents[item]
            parent = 0
            if above >= 0:  # parents come before their children: a node with another parent is dropped
                parent = node_of[start + above] if above < item - start else -1
            node_of[item] = -1
            if parent < 0:
                continue
            prob = guess(probs[item])
            mixed = np.uint64(parent) << np.uint64(32) | np.uint64(np.uint32(tokens[item]))
            mixed *= np.uint64(0x9E3779B97F4A7C15)
            entry = np.int64(mixed >> np.uint64(40)) & (len(table) - 1)
            node = table[entry]
            while node > 0 and (trie_token[node] != tokens[item] or trie_parent[node] != parent):
                entry = (entry + 1) & (len(table) - 1)
                node = table[entry]
            if node == 0:
                node = size
                table[entry] = node
                size += 1
                trie_token[node] = tokens[item]
                trie_parent[node] = parent
                trie_depth[node] = trie_depth[parent] + 1
                trie_sibling[node] = trie_child[parent]
                trie_child[parent] = node
                evidence[node, RANK] = RANKS - 1
            evidence[node, own + ODDS] = probs[item]  # log odds once it is weighed
            evidence[node, own + LENGTH] = length_bucket(lengths[item])
            evidence[node, RANK] = min(evidence[node, RANK], children[parent, column])
            children[parent, column] += 1
            covered[parent, column] += prob
            trie_mask[node] |= bit
            trie_named[node] |= 1 << source
            node_of[item] = node

    path = np.empty(size, np.float64)
    calibrated = np.empty(size, np.float64)
    heap = np.empty(size, np.int32)
    path[0] = 1.0
    chosen = min(budget, size - 1)
    out_index = np.empty(size, np.int32)
    out_index[0] = 0
    out_nodes[0, 0] = root_token
    out_nodes[1, 0] = -1
    out_nodes[2, 0] = 0
    out_probs[:, 0] = 1.0
    out_sources[0] = 0
    out_evidence[0] = 0.0
    out_evidence[0, MASK] = used
    waiting = 0
    parent = 0
    for number in range(1, chosen + 1):
        # Children are weighed when their parent is chosen: most nodes of a large trie never are.
        for column in range(sources):
            if covered[parent, column] > 0.0:
                left[column] = np.log(max(1.0 - covered[parent, column], LEAST_LEFT))
        node = trie_child[parent]
        while node >= 0:
            mask = trie_mask[node]
            evidence[node, MASK] = mask
            evidence[node, DEPTH] = trie_depth[node]
            evidence[node, TIME] = times_of(occurrences, trie_token[node])
            own = OWN
            for column in range(sources):
                if mask >> slots[column] & 1:
                    evidence[node, own + ODDS] = log_odds(evidence[node, own + ODDS])
                elif covered[parent, column] > 0.0:
                    evidence[node, own + LEFT] = left[column]
                own += PER_SOURCE
            odds = mixed_odds(evidence[node], slots, weights, parameters, request)
            raw = guess(1.0 / (1.0 + np.exp(-odds)))
            cell = cell_of(mask, odds)
            evidence[node, RAW] = raw
            evidence[node, CELL] = cell
            ratio = (accepted[cell] + prior) / (expected[cell] + prior)
            calibrated[node] = guess(raw * ratio)
            node = trie_sibling[node]
        if position >= 0 and trie_child[parent] >= 0:
            sharpen(
                trie_child[parent], trie_sibling, trie_token, trie_mask, sample_key,
                position + trie_depth[parent], vocabulary, sharpness, calibrated, evidence, NOISE,
            )  # fmt: skip
        node = trie_child[parent]
        while node >= 0:
            path[node] = path[parent] * calibrated[node]
            push(heap, waiting, path, node)
            waiting += 1
            node = trie_sibling[node]
        node = pop(heap, waiting, path)
        waiting -= 1
        out_index[node] = number
        out_nodes[0, number] = trie_token[node]
        out_nodes[1, number] = out_index[trie_parent[node]]
        out_nodes[2, number] = trie_depth[node]
        out_probs[0, number] = calibrated[node]
        out_probs[1, number] = path[node]
        out_sources[number] = trie_named[node]
        for column in range(evidence.shape[1]):  # numba compiles a message about shapes for a whole row
            out_evidence[number, column] = evidence[node, column]
        parent = node
    return chosen + 1


@kernel
def score(
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    evidence: NDArray[np.float32],
    emitted: NDArray[np.int32],
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    rate: float,
    request_rate: float,
    memory: float,
    switches: NDArray[np.float64],
    sharpness: NDArray[np.float64],
    sharpness_rate: float,
    outcomes: NDArray[np.int8],
) -> None:
    """Learns from every node whose parent was accepted: it was, or was not, emitted by the target.

    The terms of its log odds take a step of logistic regression, its cell counts the outcome; old outcomes
    are halved at intervals.

    Args:
        tokens: int32, shape (n + 1,). The tree's.
        parents: int32, shape (n + 1,). -1 for the root.
        evidence: float32, shape (n + 1, columns).
        emitted: int32, shape (m,). Tokens that the target emitted after the root.
        weights: float64, shape (MASKS, SOURCES + 1). Changed, as are the next four.
        parameters: float64, shape (SOURCES, PARAMETERS).
        request: float64, shape (SOURCES,).
        expected: float64, shape (CELLS,).
        accepted: float64, shape (CELLS,).
        rate: Learning rate.
        request_rate: Learning rate of `request`.
        memory: Expected acceptances at which the sums of a cell are halved.
        switches: float64, shape (kinds,), 1 or 0. Kinds of terms that are learned.
        sharpness: float64, shape (MASKS, 2). Changed.
        sharpness_rate: Learning rate of `sharpness`; 0 where there is no noise.
        outcomes: int8, shape (n + 1,). Gets 1 or 0 for each such node, -1 for the others.
    """
    used = index_in(evidence[0, MASK], MASKS)
    depth = np.full(len(tokens), -1, np.int64)
    depth[0] = 0
    outcomes[0] = -1
    for node in range(1, len(tokens)):
        outcomes[node] = -1
        above = depth[parents[node]] if 0 <= parents[node] < node else -1
        if above < 0 or above >= len(emitted):
            continue
        taken = tokens[node] == emitted[above]
        outcomes[node] = taken
        if taken:
            depth[node] = above + 1
        raw = guess(evidence[node, RAW])
        cell = index_in(evidence[node, CELL], CELLS)
        teach(evidence[node], taken - raw, rate, request_rate, used, weights, parameters, request, switches)
        if sharpness_rate > 0.0:
            odds, shift = evidence[node, NOISE], evidence[node, NOISE + 1]
            mask = index_in(evidence[node, MASK], MASKS)
            teach_sharpness(odds, shift, taken, sharpness_rate, mask, sharpness)
        expected[cell] += switches[LEARNS_CELLS] * raw
        accepted[cell] += switches[LEARNS_CELLS] * taken
        if expected[cell] > memory:
            expected[cell] *= 0.5
            accepted[cell] *= 0.5
