"""Rows of an adjacency matrix that come from elsewhere, and contexts found in a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.index._kernels.adjacency import (
    NO_ROW,
    ORDERS,
    find_context,
    find_row,
    guesses_of,
    take_row,
)


@kernel
def merge(
    keys: NDArray[np.uint64],
    used: NDArray[np.int32],
    visits: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    other_keys: NDArray[np.uint64],
    other_visits: NDArray[np.int32],
    other_tokens: NDArray[np.int32],
    other_probs: NDArray[np.float32],
    times: NDArray[np.int32],
    cap: int,
) -> None:
    """Merges other rows into a table: counts add up, means are weighted by them.

    Args:
        keys: uint64, shape (rows,), a power of two. Changed, as are the next four.
        used: int32, shape (rows,).
        visits: int32, shape (rows,).
        tokens: int32, shape (rows, k).
        probs: float32, shape (rows, k).
        other_keys: uint64, shape (m,), none of them 0.
        other_visits: int32, shape (m,), from 1 on.
        other_tokens: int32, shape (m, j). Different ones, -1 at the end where there are fewer.
        other_probs: float32, shape (m, j). Descending.
        times: int32, shape (m,). When each was written last, for eviction.
        cap: Limit of a row's count.
    """
    width, more = tokens.shape[1], other_tokens.shape[1]
    merged_tokens = np.empty(width + more, np.int32)
    merged_probs = np.empty(width + more, np.float64)
    for item in range(len(other_keys)):
        row = take_row(keys, used, visits, other_keys[item])
        earlier = np.int64(visits[row])
        used[row] = times[item] if earlier == 0 else max(used[row], times[item])
        total = earlier + other_visits[item]
        row_tokens, row_probs = guesses_of(tokens, probs, row)
        if earlier == 0:
            visits[row] = min(total, cap)
            for column in range(width):
                row_tokens[column] = other_tokens[item, column] if column < more else -1
                row_probs[column] = other_probs[item, column] if column < more else 0.0
            continue
        size = 0
        while size < width and row_tokens[size] >= 0:
            merged_tokens[size] = row_tokens[size]
            merged_probs[size] = row_probs[size] * (earlier / total)
            size += 1
        for column in range(more):
            token = other_tokens[item, column]
            if token < 0:
                break
            prob = other_probs[item, column] * (other_visits[item] / total)
            slot = 0
            while slot < size and merged_tokens[slot] != token:
                slot += 1
            if slot < size:
                merged_probs[slot] += prob
            else:
                merged_tokens[slot], merged_probs[slot] = token, prob
                size += 1
        for column in range(1, size):  # best first, of equal ones the lower id: in any order of merges
            token, prob, slot = merged_tokens[column], merged_probs[column], column
            while slot > 0 and (
                merged_probs[slot - 1] < prob
                or (merged_probs[slot - 1] == prob and merged_tokens[slot - 1] > token)
            ):
                merged_tokens[slot], merged_probs[slot] = merged_tokens[slot - 1], merged_probs[slot - 1]
                slot -= 1
            merged_tokens[slot], merged_probs[slot] = token, prob
        visits[row] = min(total, cap)
        for column in range(width):
            row_tokens[column] = merged_tokens[column] if column < size else -1
            row_probs[column] = merged_probs[column] if column < size else 0.0


@kernel
def forget(
    keys: NDArray[np.uint64],
    visits: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    contexts: NDArray[np.int32],
) -> int:
    """Empties the rows of contexts; their keys stay, so that others are found.

    Args:
        keys: uint64, shape (rows,).
        visits: int32, shape (rows,). Changed, as are the next two.
        tokens: int32, shape (rows, k).
        probs: float32, shape (rows, k).
        contexts: int32, shape (m, 4). Oldest token first, -1 where there are fewer.

    Returns:
        Rows emptied.
    """
    emptied = 0
    for item in range(len(contexts)):
        for order in range(1, ORDERS + 1):
            if contexts[item, ORDERS - order] < 0:
                break
            row = find_context(keys, contexts[item], order)
            if row != NO_ROW and visits[row] > 0:
                visits[row] = 0
                tokens[row] = -1
                probs[row] = 0.0
                emptied += 1
    return emptied


@kernel
def empty(keys: NDArray[np.uint64], visits: NDArray[np.int32], emptied: NDArray[np.uint64]) -> None:
    """Empties the rows of keys, uint64, shape (m,); the keys stay, so that others are found.

    Args:
        keys: uint64, shape (rows,).
        visits: int32, shape (rows,). Changed.
        emptied: uint64, shape (m,).
    """
    for key in emptied:
        row = find_row(keys, key)
        if row != NO_ROW:
            visits[row] = 0


@kernel
def find_contexts(
    contexts: NDArray[np.int32], text: NDArray[np.int32], first: int, found: NDArray[np.int32]
) -> None:
    """Finds which contexts end at which positions of a text.

    Args:
        contexts: int32, shape (m, 4). Oldest token first, -1 where there are fewer.
        text: int32, shape (n,), with -1 for the four positions before its beginning.
        first: The first position, 3 at least.
        found: int32, shape (n - first,). Written: the first context that ends at each position, or -1.
    """
    for position in range(first, len(text)):
        found[position - first] = -1
        for item in range(len(contexts)):
            back = 0
            while back < ORDERS and contexts[item, ORDERS - 1 - back] == text[position - back]:
                back += 1
            if back == ORDERS:
                found[position - first] = item
                break


@kernel
def first_unsound(
    keys: NDArray[np.uint64],
    visits: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    vocabulary: int,
    most: int,
) -> int:
    """The first row that no matrix can have learned, or -1: what `merge` relies on.

    Args:
        keys: uint64, shape (m,). Odd.
        visits: int32, shape (m,). 1 to `most`.
        tokens: int32, shape (m, k). Different ids below `vocabulary`, one at least, -1 at the end.
        probs: float32, shape (m, k). 0 to 1, descending.
        vocabulary: Number of token ids.
        most: Limit of a row's count.
    """
    for row in range(len(keys)):
        if keys[row] & np.uint64(1) == 0 or visits[row] < 1 or visits[row] > most or tokens[row, 0] < 0:
            return row
        before = np.float32(1.0)
        ended = False
        for column in range(tokens.shape[1]):
            token, prob = tokens[row, column], probs[row, column]
            ended = ended or token == -1
            if ended:
                if token != -1:
                    return row
                continue
            if token < 0 or token >= vocabulary or not (prob >= 0.0 and prob <= before):
                return row
            before = prob
            for other in range(column):
                if tokens[row, other] == token:
                    return row
    return -1
