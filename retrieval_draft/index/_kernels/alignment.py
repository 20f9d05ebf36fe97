"""Alignment of a text that is being written with the earlier text that it copies, across edits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

POINTER, MATCHED, LOST = range(3)
META_FIELDS = 3
"""POINTER is the position in the text of the token that is to follow, -1 where nothing is copied; MATCHED the
tokens copied so far, or 0 after an edit; LOST the tokens since the copy was left, 0 while it goes on."""

NGRAM = 4
"""Tokens that begin a copy."""

FORGET = 24
"""Tokens after which a copy that was left is forgotten."""

BEFORE, AFTER = 4, 48
"""Tokens around the place where a copy was left in which it may go on."""

CHAINS = 3
"""Places where a copy may go on that are proposed together."""

LONGEST = 6
"""Tokens compared at such a place."""


@kernel
def hash_before(text: NDArray[np.int32], end: int, size: int) -> int:
    """Slot in a table of `size`, a power of two, of the NGRAM tokens before `end`."""
    mixed = np.uint64(0x9E3779B97F4A7C15)
    for index in range(end - NGRAM, end):
        mixed ^= np.uint64(text[index]) + np.uint64(0x632BE59BD9B4E019)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    return np.int64(mixed & np.uint64(size - 1))


@kernel
def matched_before(text: NDArray[np.int32], first: int, second: int, most: int) -> int:
    """Tokens, `most` at most, that are the same before two places of `text`; none across a text's end."""
    count = 0
    while count < most and count < first and count < second:
        token = text[first - 1 - count]
        if token < 0 or token != text[second - 1 - count]:
            break
        count += 1
    return count


@kernel
def append(
    text: NDArray[np.int32], length: int, tokens: NDArray[np.int32], table: NDArray[np.int32],
    meta: NDArray[np.int64],
) -> None:  # fmt: skip
    """Appends tokens, and follows the copy.

    Args:
        text: int32, shape (room,), room for all. Changed, as are `table` and `meta`.
        length: Tokens in it.
        tokens: int32, shape (m,). -1 ends a text.
        table: int32, shape (slots,), a power of two. The last place after each n-gram, 0 for none.
        meta: int64, shape (META_FIELDS,).
    """
    for token in tokens:
        if meta[POINTER] >= 0:
            if meta[LOST] == 0 and text[meta[POINTER]] == token:
                meta[POINTER] += 1
                meta[MATCHED] += 1
            else:
                meta[LOST] += 1
                meta[MATCHED] = 0
                if meta[LOST] > FORGET or token < 0:
                    meta[POINTER], meta[LOST] = -1, 0
        text[length] = token
        length += 1
        if length < NGRAM or text[length - NGRAM : length].min() < 0:
            continue
        slot = hash_before(text, length, len(table))
        place = table[slot]
        table[slot] = length
        if place > 0 and (meta[POINTER] < 0 or meta[LOST] > 0):
            matched = matched_before(text, place, length, 32)
            if matched >= NGRAM:
                meta[POINTER], meta[MATCHED], meta[LOST] = place, matched, 0


@kernel
def propose(
    text: NDArray[np.int32],
    length: int,
    meta: NDArray[np.int64],
    chances: NDArray[np.float32],
    budget: int,
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    probs: NDArray[np.float32],
    lengths: NDArray[np.int32],
) -> int:
    """Chains from the places where the copy may go on, the best first.

    Returns:
        Nodes written.
    """
    pointer = meta[POINTER]
    if pointer < 0 or budget <= 0:
        return 0
    places = np.zeros(CHAINS, np.int64)
    match = np.zeros(CHAINS, np.int64)
    count = 0
    if meta[LOST] == 0:
        places[0], match[0], count = pointer, meta[MATCHED], 1
    else:
        # The nearest place after the most tokens that are the same; then the place that the copy would have
        # reached, had as many tokens been replaced.
        for place in range(max(pointer - BEFORE, 1), min(pointer + AFTER, length)):
            matched = matched_before(text, place, length, LONGEST)
            if matched == 0 or text[place] < 0:
                continue
            slot = count
            for index in range(count):
                if text[places[index]] == text[place]:
                    slot = -1 if match[index] >= matched else index
                    break
            if slot < 0:
                continue
            if slot == count:
                if count < CHAINS:
                    count += 1
                else:
                    slot -= 1
                    if match[slot] >= matched:
                        continue
            while slot > 0 and match[slot - 1] < matched:
                match[slot], places[slot] = match[slot - 1], places[slot - 1]
                slot -= 1
            match[slot], places[slot] = matched, place
        place = pointer + meta[LOST]
        if place < length and count < CHAINS and text[place] >= 0:
            known = False
            for index in range(count):
                known = known or text[places[index]] == text[place]
            if not known:
                places[count], match[count] = place, 0
                count += 1
    size = 0
    for chain in range(count):
        room = budget - size if chain == count - 1 else max((budget - size) // 2, 1)
        parent = -1
        place, matched = places[chain], match[chain]
        while room > 0 and size < budget and place < length and text[place] >= 0:
            tokens[size] = text[place]
            parents[size] = parent
            probs[size] = chances[min(matched, len(chances) - 1)]
            lengths[size] = matched
            parent = size
            size += 1
            place += 1
            matched += 1
            room -= 1
    return size
