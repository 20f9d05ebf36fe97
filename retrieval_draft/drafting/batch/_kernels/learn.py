"""Updates the calibration and the texts with the tokens that the rows of a batch emitted, row by row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.views import int32_row
from retrieval_draft.drafting._kernels.fusion import count_tokens, score
from retrieval_draft.drafting.batch._kernels.slots import (
    CHAIN,
    ID,
    LENGTH,
    PENDING,
    SLOT_MASK,
    STAMP,
    TEXT,
    TEXT_ROOM,
)

ALL_FIT = -1
UNKNOWN_ID, TWICE = range(2)


@kernel
def check_rows(
    ids: NDArray[np.int64], slots: NDArray[np.int64], starts: NDArray[np.int64], stamp: int
) -> tuple[int, int, int]:
    """True if every row is an open session, and none comes twice.

    Args:
        ids: int64, shape (rows,).
        slots: int64, shape (slots, SLOT_FIELDS).
        starts: int64, shape (rows + 1,). Index of the first new token of each row.
        stamp: Of this step; larger than that of any step before.

    Returns:
        The first wrong row or ALL_FIT, the code of the fault, and the number of rows with too little room for
        their text.
    """
    tight = 0
    for row in range(len(ids)):
        slot = ids[row] & SLOT_MASK
        if ids[row] < 0 or slot >= len(slots) or slots[slot, ID] != ids[row]:
            return row, UNKNOWN_ID, 0
        if slots[slot, STAMP] == stamp:
            return row, TWICE, 0
        slots[slot, STAMP] = stamp
        if slots[slot, LENGTH] + starts[row + 1] - starts[row] > slots[slot, TEXT_ROOM]:
            tight += 1
    return ALL_FIT, 0, tight


@kernel
def learn_rows(
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    tokens: NDArray[np.int32],
    slots: NDArray[np.int64],
    nodes: NDArray[np.int32],
    evidence: NDArray[np.float32],
    chosen: NDArray[np.int32],
    weights: NDArray[np.float64],
    parameters: NDArray[np.float64],
    request: NDArray[np.float64],
    occurrences: NDArray[np.uint8],
    expected: NDArray[np.float64],
    accepted: NDArray[np.float64],
    rate: float,
    request_rate: float,
    memory: float,
    switches: NDArray[np.float64],
    sharpness: NDArray[np.float64],
    contexts: NDArray[np.int32],
) -> tuple[int, int]:
    """Scores each row's proposals against its emitted tokens, and appends these to its text.

    Args:
        ids: int64, shape (rows,).
        starts: int64, shape (rows + 1,).
        tokens: int32, shape (tokens,). The emitted tokens, one row after the other.
        slots: int64, shape (slots, SLOT_FIELDS).
        nodes: int32, shape (slots, 2, nodes). Tokens and parents of the proposals.
        evidence: float32, shape (slots, nodes, columns).
        chosen: int32, shape (slots, max_chain). Nodes of each chain.
        weights, parameters, expected, accepted, switches, sharpness: As `fusion.score` takes them.
        request: float64, shape (slots, SOURCES).
        occurrences: uint8, shape (slots, COUNTERS). Changed.
        contexts: int32, shape (tokens, width). Gets the tokens before each token, -1 where there are fewer.

    Returns:
        Tokens of the chains whose outcome was seen, and how many of them were emitted.
    """
    width = contexts.shape[1]
    outcomes = np.empty(nodes.shape[2], np.int8)
    all_drafted, all_taken = 0, 0
    for row in range(len(ids)):
        slot = ids[row] & SLOT_MASK
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        emitted = tokens[first:last]
        size = slots[slot, PENDING]
        if size > 1:
            score(
                nodes[slot, 0, :size], nodes[slot, 1, :size], evidence[slot, :size], emitted, weights,
                parameters, request[slot], expected, accepted, rate, request_rate, memory, switches,
                sharpness, 0.0, outcomes,
            )  # fmt: skip
        count_tokens(emitted, occurrences[slot])
        drafted = slots[slot, CHAIN]
        most = min(drafted, len(emitted) - 1)  # the last one is the model's own
        taken = 0
        while taken < most and nodes[slot, 0, chosen[slot, taken]] == emitted[taken]:
            taken += 1
        all_drafted += drafted
        all_taken += taken
        slots[slot, PENDING] = 0
        slots[slot, CHAIN] = 0
        length = slots[slot, LENGTH]
        text = int32_row(slots[slot, TEXT], slots[slot, TEXT_ROOM])
        for item in range(len(emitted)):
            for back in range(width):
                position = length - width + back
                contexts[first + item, back] = text[position] if position >= 0 else -1
            text[length] = emitted[item]
            length += 1
        slots[slot, LENGTH] = length
    return all_drafted, all_taken
