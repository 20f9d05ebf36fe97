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
def propose(
    tail: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    weights: NDArray[np.float32],
    out_tokens: NDArray[np.int32],
    out_probs: NDArray[np.float32],
    out_lengths: NDArray[np.int32],
) -> int:
    """Children of the root by the weighted sum of their probabilities at the last positions, best first.

    Args:
        tail: int32, shape (longest,). The text's last tokens.
        tokens: int32, shape (positions, kept). See `keep`.
        probs: float32, shape (positions, kept).
        weights: float32, shape (positions,).
        out_tokens: int32, shape (room,). Written, as are the next two.
        out_probs: float32, shape (room,).
        out_lengths: int32, shape (room,). Tokens since the last position that ranked each, 4 for more.

    Returns:
        Guesses written.
    """
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
            while slot < size and out_tokens[slot] != token:
                slot += 1
            if slot == size:
                if size == len(out_tokens):
                    continue
                out_tokens[slot], out_probs[slot], out_lengths[slot] = token, 0.0, min(back, 4)
                size += 1
            out_probs[slot] += share
    for last in range(1, size):
        token, prob, length = out_tokens[last], out_probs[last], out_lengths[last]
        slot = last
        while slot > 0 and out_probs[slot - 1] < prob:
            out_tokens[slot], out_probs[slot] = out_tokens[slot - 1], out_probs[slot - 1]
            out_lengths[slot] = out_lengths[slot - 1]
            slot -= 1
        out_tokens[slot], out_probs[slot], out_lengths[slot] = token, prob, length
    return size
