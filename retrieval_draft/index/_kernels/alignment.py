"""Alignment of a growing text with the earlier text that it copies, across edits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

POINTER, MATCHED, LOST = range(3)
META_FIELDS = 3
"""POINTER is the position in the text of the token that the copy predicts, -1 where nothing is copied;
MATCHED the tokens that were copied in a row, 0 after an edit; LOST the tokens since the copy was left, 0
while it continues."""

NGRAM = 4
"""Equal tokens with which a copy begins."""

COUNTED = 32
"""Equal tokens that are counted before the position where a copy begins."""

FORGET = 24
"""Tokens after which a copy that was left is forgotten."""

BEFORE, AFTER = 4, 48
"""Tokens around the position where a copy was left among which it may continue."""

COMPARED = 6
"""Equal tokens that are counted before such a position."""

POSITIONS = 3
"""Such positions that are proposed together."""


@kernel
def slot_of(text: NDArray[np.int32], end: int, slots: int) -> int:
    """Slot of the NGRAM tokens before `end` in a table of `slots`, a power of two.

    Args:
        text: int32, shape (room,).
        end: Position in it, NGRAM or more.
        slots: Slots of the table.
    """
    mixed = np.uint64(0x9E3779B97F4A7C15)
    for index in range(end - NGRAM, end):
        mixed ^= np.uint64(text[index]) + np.uint64(0x632BE59BD9B4E019)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    return np.int64(mixed & np.uint64(slots - 1))


@kernel
def equal_before(text: NDArray[np.int32], first: int, second: int, most: int) -> int:
    """Number of equal tokens before two positions of `text`, int32, `most` at most; a text's end differs."""
    count = 0
    while count < most and count < first and count < second:
        token = text[first - 1 - count]
        if token < 0 or token != text[second - 1 - count]:
            break
        count += 1
    return count


@kernel
def append(
    text: NDArray[np.int32],
    length: int,
    tokens: NDArray[np.int32],
    table: NDArray[np.int32],
    meta: NDArray[np.int64],
) -> None:
    """Appends tokens and follows the copy.

    Args:
        text: int32, shape (room,), with room for them. Changed, as are `table` and `meta`.
        length: Tokens in `text`.
        tokens: int32, shape (m,). -1 ends a text.
        table: int32, shape (slots,), a power of two. The last position after each n-gram, 0 for none.
        meta: int64, shape (META_FIELDS,).
    """
    since = 0  # tokens since a text's end
    while since < NGRAM - 1 and since < length and text[length - 1 - since] >= 0:
        since += 1
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
        since = since + 1 if token >= 0 else 0
        if since < NGRAM:
            continue
        slot = slot_of(text, length, len(table))
        position = np.int64(table[slot])
        table[slot] = length
        if position > 0 and (meta[POINTER] < 0 or meta[LOST] > 0):
            equal = equal_before(text, position, length, COUNTED)
            if equal >= NGRAM:
                meta[POINTER], meta[MATCHED], meta[LOST] = position, equal, 0


@kernel
def find_positions(
    text: NDArray[np.int32],
    length: int,
    meta: NDArray[np.int64],
    positions: NDArray[np.int64],
    equal: NDArray[np.int64],
) -> int:
    """Positions where the copy may continue, of different tokens; those after the most equal tokens first.

    The last one is that which the copy would have reached, had as many tokens been replaced as were written.

    Args:
        text: int32, shape (room,).
        length: Tokens in it.
        meta: int64, shape (META_FIELDS,).
        positions: int64, shape (POSITIONS,). Written, as is `equal`.
        equal: int64, shape (POSITIONS,). Equal tokens before each position.

    Returns:
        Number of positions.
    """
    pointer, lost = meta[POINTER], meta[LOST]
    if lost == 0:
        positions[0], equal[0] = pointer, meta[MATCHED]
        return 1
    count = 0
    for position in range(max(pointer - BEFORE, 1), min(pointer + AFTER, length)):
        found = equal_before(text, position, length, COMPARED)
        if found == 0 or text[position] < 0:
            continue
        slot = 0
        while slot < count and text[positions[slot]] != text[position]:
            slot += 1
        if slot == count and count == POSITIONS:
            slot -= 1
        elif slot == count:
            equal[slot] = 0
            count += 1
        if equal[slot] >= found:
            continue
        while slot > 0 and equal[slot - 1] < found:
            equal[slot], positions[slot] = equal[slot - 1], positions[slot - 1]
            slot -= 1
        equal[slot], positions[slot] = found, position
    position = pointer + lost
    if count < POSITIONS and position < length and text[position] >= 0:
        slot = 0
        while slot < count and text[positions[slot]] != text[position]:
            slot += 1
        if slot == count:
            positions[count], equal[count] = position, 0
            count += 1
    return count


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
    """Chains of the tokens from each position where the copy may continue; the first gets half of the nodes.

    Args:
        text: int32, shape (room,).
        length: Tokens in it.
        meta: int64, shape (META_FIELDS,).
        chances: float32. Probability of a token by the equal ones before it; the last for more.
        budget: Nodes at most.
        tokens: int32, shape (budget,). Written, as are the next three.
        parents: int32, shape (budget,). -1 for children of the root.
        probs: float32, shape (budget,). Probability given the parent.
        lengths: int32, shape (budget,). Equal tokens before each.

    Returns:
        Nodes written.
    """
    if meta[POINTER] < 0:
        return 0
    positions = np.zeros(POSITIONS, np.int64)
    equal = np.zeros(POSITIONS, np.int64)
    count = find_positions(text, length, meta, positions, equal)
    size = 0
    for chain in range(count):
        rest = budget - size
        room = rest if chain == count - 1 else (rest + 1) // 2
        position, parent = positions[chain], -1
        while room > 0 and position < length and text[position] >= 0:
            tokens[size] = text[position]
            parents[size] = parent
            probs[size] = chances[min(equal[chain], len(chances) - 1)]
            lengths[size] = equal[chain]
            parent = size
            size += 1
            position += 1
            equal[chain] += 1
            room -= 1
    return size
