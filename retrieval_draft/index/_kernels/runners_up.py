"""Tokens that the target ranked high, but did not choose, at the last positions of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

LEAST = 1e-4
"""Least probability of a guess."""


@kernel
def keep(
    tail: NDArray[np.int32],
    contexts: NDArray[np.int32],
    top_tokens: NDArray[np.int32],
    top_probs: NDArray[np.float32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
) -> None:
    """Keeps predictions at positions of the text; those at rejected nodes have other contexts.

    Args:
        tail: int32, shape (positions + width,). The text's last tokens, -1 before its beginning.
        contexts: int32, shape (m, width).
        top_tokens: int32, shape (m, k).
        top_probs: float32, shape (m, k).
        tokens: int32, shape (positions, kept). Row b holds the predictions that chose the token b before the
            last one, -1 where there are none. Written, as is `probs`.
        probs: float32, shape (positions, kept).
    """
    width = contexts.shape[1]
    for back in range(len(tokens)):
        end = len(tail) - 1 - back
        if end < width or tokens[back, 0] >= 0:  # older ones are there already
            break
        for row in range(len(contexts)):
            index = 0
            while index < width and contexts[row, index] == tail[end - width + index]:
                index += 1
            if index < width:
                continue
            for column in range(min(tokens.shape[1], top_tokens.shape[1])):
                tokens[back, column] = top_tokens[row, column]
                probs[back, column] = top_probs[row, column]
            break


@kernel
def advance(
    tail: NDArray[np.int32],
    emitted: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
) -> None:
    """Appends tokens to the text; the predictions move back.

    Args:
        tail: int32, shape (longest,). The text's last tokens. Changed, as are `tokens` and `probs`.
        emitted: int32, shape (m,).
        tokens: int32, shape (positions, kept). See `keep`.
        probs: float32, shape (positions, kept).
    """
    longest, positions, moved = len(tail), len(tokens), len(emitted)
    for index in range(longest):
        source = index + moved
        tail[index] = tail[source] if source < longest else emitted[source - longest]
    for back in range(positions - 1, -1, -1):
        for column in range(tokens.shape[1]):
            if back < moved:
                tokens[back, column] = -1
            else:
                tokens[back, column] = tokens[back - moved, column]
                probs[back, column] = probs[back - moved, column]


@kernel
def propose(
    tail: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    weights: NDArray[np.float32],
    out_nodes: NDArray[np.int32],
    out_probs: NDArray[np.float32],
) -> int:
    """Children of the root by the weighted sum of their probabilities at the last positions, best first.

    Args:
        tail: int32, shape (longest,). The text's last tokens.
        tokens: int32, shape (positions, kept). See `keep`.
        probs: float32, shape (positions, kept).
        weights: float32, shape (positions,).
        out_nodes: int32, shape (3, budget). Written: tokens, parents, and tokens since the last position that
            ranked each, 4 for more.
        out_probs: float32, shape (budget,). Written.

    Returns:
        Guesses written.
    """
    guesses = np.empty(tokens.size, np.int32)
    lengths = np.empty(tokens.size, np.int32)
    sums = np.empty(tokens.size, np.float32)
    size = 0
    for back in range(len(tokens)):
        chosen = tail[len(tail) - 1 - back]
        for column in range(tokens.shape[1]):
            token = tokens[back, column]
            share = probs[back, column] * weights[back]
            if token < 0 or share < LEAST:
                break
            if token == chosen:
                continue
            slot = 0
            while slot < size and guesses[slot] != token:
                slot += 1
            if slot == size:
                guesses[slot], sums[slot], lengths[slot] = token, 0.0, min(back, 4)
                size += 1
            sums[slot] += share
    budget = len(out_probs)
    order = np.empty(budget, np.int32)
    kept = 0
    for slot in range(size):
        node = kept
        if kept < budget:
            kept += 1
        elif out_probs[budget - 1] < sums[slot]:
            node = budget - 1
        else:
            continue
        while node > 0 and out_probs[node - 1] < sums[slot]:
            order[node], out_probs[node] = order[node - 1], out_probs[node - 1]
            node -= 1
        order[node], out_probs[node] = slot, sums[slot]
    for node in range(kept):
        out_nodes[0, node], out_nodes[1, node], out_nodes[2, node] = (
            guesses[order[node]], -1, lengths[order[node]],
        )  # fmt: skip
    return kept
