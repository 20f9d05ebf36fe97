"""n-gram adjacency rows in one open-addressing table: next tokens with averaged probabilities.

keys[r]    hash of (order, last `order` tokens), 0 where the row is free
visits[r]  observations averaged into the row, capped
used[r]    time of the row's last write, for eviction
tokens[r]  top-k next tokens, most probable first, -1 where there are fewer
probs[r]   their averaged probabilities

Key, visits and time of a row lie side by side, as do its tokens and probabilities. No row becomes free again,
so a key lies before the first free row of its window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.heap import BUCKETS, CUT, THRESHOLDS, admit, pop
from retrieval_draft._kernels.jit import inner_kernel, kernel
from retrieval_draft._kernels.views import float32_row, int32_row, prefetch

ORDERS = 4
WINDOW = 8
"""Slots that can hold a key; the oldest of them is evicted when all are taken."""

NO_ROW = -1


@kernel
def key_of(context: NDArray[np.int32], order: int) -> np.uint64:
    """Hash of the last `order` tokens of `context`, never 0 (0 marks a free row).

    Args:
        context: int32, shape (length,), of which `order` tokens are read.
        order: 1 to 4.
    """
    mixed = np.uint64(order) * np.uint64(0x9E3779B97F4A7C15)
    for index in range(len(context) - order, len(context)):
        mixed ^= np.uint64(context[index]) + np.uint64(0x632BE59BD9B4E019)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    return mixed | np.uint64(1)


@kernel
def find_row(keys: NDArray[np.uint64], key: np.uint64) -> int:
    """The row of `key` in `keys`, uint64, shape (rows,), or NO_ROW."""
    mask = np.uint64(len(keys) - 1)
    start = key >> np.uint64(17)
    for step in range(WINDOW):
        row = np.int64((start + np.uint64(step)) & mask)
        if keys[row] == key:
            return row
        if keys[row] == 0:
            break
    return NO_ROW


@kernel
def find_context(keys: NDArray[np.uint64], context: NDArray[np.int32], order: int) -> int:
    """The row of the last `order` tokens of `context`, or NO_ROW.

    Args:
        keys: uint64, shape (rows,).
        context: int32, shape (length,), of which `order` tokens are read.
        order: 1 to 4.
    """
    return find_row(keys, key_of(context, order))


@kernel
def take_row(
    keys: NDArray[np.uint64], used: NDArray[np.int32], visits: NDArray[np.int32], key: np.uint64
) -> int:
    """The row of `key`; a free one or the least recently written one of its window if it has none.

    Args:
        keys: uint64, shape (rows,), a power of two. Changed for a new row, as is `visits`.
        used: int32, shape (rows,).
        visits: int32, shape (rows,).
        key: From `key_of`.
    """
    mask = np.uint64(len(keys) - 1)
    start = key >> np.uint64(17)
    oldest = np.int64(start & mask)
    for step in range(WINDOW):
        row = np.int64((start + np.uint64(step)) & mask)
        if keys[row] == key:
            return row
        if keys[row] == 0:
            oldest = row
            break
        if used[row] < used[oldest]:
            oldest = row
    keys[oldest] = key
    visits[oldest] = 0
    return oldest


@inner_kernel
def _ask_row(
    keys: NDArray[np.uint64], tokens: NDArray[np.int32], probs: NDArray[np.float32], key: np.uint64
) -> None:
    """Prefetches the first row that can hold `key`."""
    row = np.int64((key >> np.uint64(17)) & np.uint64(len(keys) - 1))
    prefetch(keys.ctypes.data + keys.strides[0] * row)
    prefetch(tokens.ctypes.data + tokens.strides[0] * row)
    prefetch(probs.ctypes.data + probs.strides[0] * row)


@inner_kernel
def guesses_of(
    tokens: NDArray[np.int32], probs: NDArray[np.float32], row: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Views of one row: int32 and float32, shape (k,) each.

    Args:
        tokens: int32, shape (rows, k), each row in one piece.
        probs: float32, shape (rows, k), likewise.
        row: Index of the row.
    """
    width = tokens.shape[1]
    return (
        int32_row(tokens.ctypes.data + tokens.strides[0] * row, width),
        float32_row(probs.ctypes.data + probs.strides[0] * row, width),
    )


@kernel
def learn(
    keys: NDArray[np.uint64],
    used: NDArray[np.int32],
    visits: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    contexts: NDArray[np.int32],
    top_tokens: NDArray[np.int32],
    top_probs: NDArray[np.float32],
    cap: int,
    now: int,
) -> None:
    """Averages one observed distribution for each context into the rows of its orders 1 to 4.

    The n-th observation weighs 1/n until `cap`, then 1/cap, so that an old row still follows the text.

    Args:
        keys: uint64, shape (rows,), a power of two. Changed, as are the next four.
        used: int32, shape (rows,).
        visits: int32, shape (rows,).
        tokens: int32, shape (rows, k).
        probs: float32, shape (rows, k).
        contexts: int32, shape (m, 4). Oldest token first, -1 where there are fewer.
        top_tokens: int32, shape (m, j). Observed next tokens, -1 where there are fewer.
        top_probs: float32, shape (m, j). Their probabilities.
        cap: Observations after which the mean becomes a moving average.
        now: Time of the write, for eviction.
    """
    width = tokens.shape[1]
    seen = top_tokens.shape[1]
    merged_tokens = np.empty(width + seen, np.int32)
    merged_probs = np.empty(width + seen, np.float32)
    hashes = np.zeros((len(contexts), ORDERS), np.uint64)
    # Rows lie anywhere in megabytes: asked for together, most come while one is waited for.
    for item in range(len(contexts)):
        for order in range(1, ORDERS + 1):
            if contexts[item, ORDERS - order] < 0:
                break
            hashes[item, order - 1] = key_of(contexts[item], order)
            _ask_row(keys, tokens, probs, hashes[item, order - 1])
    for item in range(len(contexts)):
        for order in range(1, ORDERS + 1):
            if contexts[item, ORDERS - order] < 0:
                break
            row = take_row(keys, used, visits, hashes[item, order - 1])
            used[row] = now
            earlier = min(visits[row], cap - 1)
            visits[row] = earlier + 1
            fresh = np.float32(1.0) / np.float32(earlier + 1)
            row_tokens, row_probs = guesses_of(tokens, probs, row)
            size = 0
            while earlier > 0 and size < width and row_tokens[size] >= 0:
                merged_tokens[size] = row_tokens[size]
                merged_probs[size] = row_probs[size] * (np.float32(1.0) - fresh)
                size += 1
            for column in range(seen):
                token, prob = top_tokens[item, column], fresh * top_probs[item, column]
                if token < 0 or not prob >= 0.0 or prob == np.inf:
                    continue
                slot = 0
                while slot < size and merged_tokens[slot] != token:
                    slot += 1
                if slot < size:
                    prob += merged_probs[slot]
                else:
                    size += 1
                while slot > 0 and merged_probs[slot - 1] < prob:
                    merged_tokens[slot] = merged_tokens[slot - 1]
                    merged_probs[slot] = merged_probs[slot - 1]
                    slot -= 1
                merged_tokens[slot], merged_probs[slot] = token, prob
            for column in range(width):
                row_tokens[column] = merged_tokens[column] if column < size else -1
                row_probs[column] = merged_probs[column] if column < size else 0.0


@inner_kernel
def ask_keys(keys: NDArray[np.uint64], context: NDArray[np.int32], hashes: NDArray[np.uint64]) -> None:
    """Hashes a context, and prefetches the keys where its hashes may be.

    Args:
        keys: uint64, shape (table rows,). The matrix's keys.
        context: int32, shape (4,). Oldest first, -1 where the text is shorter.
        hashes: uint64, shape (4,). Written: of the last 4, 3, 2 and 1 tokens, 0 where there are fewer.
    """
    mask = np.uint64(len(keys) - 1)
    for back in range(ORDERS):
        hashes[back] = np.uint64(0)
        if context[back] >= 0:
            hashes[back] = key_of(context, ORDERS - back)
            slot = np.int64((hashes[back] >> np.uint64(17)) & mask)
            prefetch(keys.ctypes.data + keys.strides[0] * slot)


@inner_kernel
def ask_rows(
    keys: NDArray[np.uint64],
    row_tokens: NDArray[np.int32],
    row_probs: NDArray[np.float32],
    hashes: NDArray[np.uint64],
    rows: NDArray[np.int64],
) -> None:
    """Finds the rows of hashes, and prefetches them.

    Args:
        keys: uint64, shape (table rows,). The matrix's, as the next two.
        row_tokens: int32, shape (table rows, k).
        row_probs: float32, shape (table rows, k).
        hashes: uint64, shape (4,). From `ask_keys`.
        rows: int64, shape (4,). Written: NO_ROW where there is none.
    """
    for back in range(ORDERS):
        rows[back] = find_row(keys, hashes[back]) if hashes[back] != 0 else NO_ROW
        if rows[back] != NO_ROW:
            prefetch(row_tokens.ctypes.data + row_tokens.strides[0] * rows[back])
            prefetch(row_probs.ctypes.data + row_probs.strides[0] * rows[back])


@kernel
def propose(
    keys: NDArray[np.uint64],
    visits: NDArray[np.int32],
    row_tokens: NDArray[np.int32],
    row_probs: NDArray[np.float32],
    backoff: NDArray[np.float64],
    counts: NDArray[np.float32],
    frequent: NDArray[np.int32],
    total: NDArray[np.float64],
    context: NDArray[np.int32],
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
    """Best-first tree over the rows of the last 4, 3, 2 and 1 tokens and of none, blended.

    A row of order o seen v times takes ``v / (v + backoff[o])`` of the mass that reaches it and leaves the
    rest to the next shorter one. The mass left by all rows goes to the tokens that are frequent in any
    context.

    Args:
        keys: uint64, shape (rows,), a power of two.
        visits: int32, shape (rows,).
        row_tokens: int32, shape (rows, k).
        row_probs: float32, shape (rows, k).
        backoff: float64, shape (5,). Back-off constant of each order.
        counts: float32, shape (ids,). Decayed count of each token.
        frequent: int32. Tokens with the largest counts, in any order, -1 at the end where there are fewer.
        total: float64, shape (1,). Sum of all counts.
        context: int32, shape (4,). The text's last tokens, oldest first, -1 where there are fewer.
        work_int: int32, shape (candidates, 7): parent node, token, order of the row, context of four.
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
    width = row_tokens.shape[1]
    path_probs = work_float[0]
    path_bits = work_bits[0]
    current = context.copy()
    histogram = np.zeros(BUCKETS, np.int64)
    hashes, rows = np.empty(ORDERS, np.uint64), np.empty(ORDERS, np.int64)
    child_token = np.empty(ORDERS * width + len(frequent), np.int32)
    child_order = np.empty(ORDERS * width + len(frequent), np.int32)
    child_prob = np.empty(ORDERS * width + len(frequent), np.float64)
    # Counts of the frequent tokens side by side: they are read for every node.
    frequent_count = np.empty(len(frequent), np.float32)
    known = 0
    most = np.float32(0.0)
    while known < len(frequent) and 0 <= frequent[known] < len(counts):
        frequent_count[known] = counts[frequent[known]]
        most = max(most, frequent_count[known])
        known += 1
    nodes = 0
    candidates = 0
    waiting = 0
    cut = np.zeros(2, np.int64)
    path = 1.0
    node = -1
    while nodes < budget:
        needed = THRESHOLDS[cut[CUT]]
        found = 0
        mass = 1.0
        ask_keys(keys, current, hashes)
        ask_rows(keys, row_tokens, row_probs, hashes, rows)
        for back in range(ORDERS):
            order, row = ORDERS - back, rows[back]
            if row == NO_ROW or mass * path <= needed:
                continue
            weight = mass * visits[row] / (visits[row] + backoff[order])
            mass -= weight
            tokens_of, probs_of = guesses_of(row_tokens, row_probs, row)
            for column in range(width):
                token = tokens_of[column]
                if token < 0:
                    break
                match = 0
                while match < found and child_token[match] != token:
                    match += 1
                if match < found:
                    child_prob[match] += weight * probs_of[column]
                else:
                    child_token[found] = token
                    child_order[found] = order
                    child_prob[found] = weight * probs_of[column]
                    found += 1
        weight = mass / (total[0] + backoff[0])
        in_context = found
        for slot in range(known if weight * most * path > needed else 0):
            share = weight * frequent_count[slot]
            if share * path <= needed:
                continue
            token = frequent[slot]
            match = 0
            while match < in_context and child_token[match] != token:
                match += 1
            if match < in_context:
                child_prob[match] += share
            else:
                child_token[found] = token
                child_order[found] = 0
                child_prob[found] = share
                found += 1
        for child in range(found):
            prob = min(child_prob[child], 0.999)
            if prob * path <= needed or candidates == len(path_probs):
                continue
            path_probs[candidates] = prob * path
            if not admit(candidates, path_probs, path_bits, heap, waiting, histogram, cut, budget):
                continue
            work_int[candidates, 0] = node
            work_int[candidates, 1] = child_token[child]
            work_int[candidates, 2] = child_order[child]
            for back in range(ORDERS - 1):
                work_int[candidates, 3 + back] = current[back + 1]
            work_int[candidates, 2 + ORDERS] = child_token[child]
            work_float[1, candidates] = prob
            waiting += 1
            candidates += 1
        if waiting == 0:
            break
        best = pop(heap, waiting, path_probs)
        waiting -= 1
        node = nodes
        nodes += 1
        parents[node] = work_int[best, 0]
        tokens[node] = work_int[best, 1]
        lengths[node] = work_int[best, 2]
        for back in range(ORDERS):
            current[back] = work_int[best, 3 + back]
        path = path_probs[best]
        probs[node] = work_float[1, best]
    return nodes
