"""Tokens that the target ranked high at the last positions of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel


@kernel
def keep(
    tail: NDArray[np.int32],
    contexts: NDArray[np.int32],
    top_tokens: NDArray[np.int32],
    top_probs: NDArray[np.float32],
    ages: NDArray[np.int64],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
) -> None:
    """Keeps the predictions at positions of the text, and leaves out those at rejected nodes.

    Args:
        tail: int32, shape (longest,). The text's last tokens, -1 before its beginning.
        contexts: int32, shape (m, width).
        top_tokens: int32, shape (m, k).
        top_probs: float32, shape (m, k).
        ages: int64, shape (positions,). Tokens after each kept position: the slot of position p is its number
            modulo the length. Unused here.
        tokens: int32, shape (positions, k'). Row b holds those that chose the token b from the end.
        probs: float32, shape (positions, k').
    """
    width = contexts.shape[1]
    kept = min(tokens.shape[1], top_tokens.shape[1])
    for back in range(len(tokens)):
        end = len(tail) - 1 - back
        if end < width:
            break
        for row in range(len(contexts)):
            same = True
            for index in range(width):
                if contexts[row, index] != tail[end - width + index]:
                    same = False
                    break
            if same:
                for column in range(tokens.shape[1]):
                    tokens[back, column] = top_tokens[row, column] if column < kept else -1
                    probs[back, column] = top_probs[row, column] if column < kept else 0.0
                break


@kernel
def propose(
    tail: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    weights: NDArray[np.float32],
    budget: int,
    out_tokens: NDArray[np.int32],
    out_probs: NDArray[np.float32],
    out_lengths: NDArray[np.int32],
) -> int:
    size = 0
    room = len(out_tokens)
    for back in range(len(tokens)):
        chosen = tail[len(tail) - 1 - back]
        for column in range(tokens.shape[1]):
            token = tokens[back, column]
            if token < 0:
                break
            share = probs[back, column] * weights[back, 1 if token == chosen else 0]
            if share < 1e-4:
                continue
            slot = 0
            while slot < size and out_tokens[slot] != token:
                slot += 1
            if slot == size:
                if size == room:
                    continue
                out_tokens[slot] = token
                out_probs[slot] = 0.0
                out_lengths[slot] = min(back, 4) if token != chosen else 5
                size += 1
            out_probs[slot] += share
    # insertion sort of the best
    for slot in range(1, size):
        token, prob, length = out_tokens[slot], out_probs[slot], out_lengths[slot]
        at = slot
        while at > 0 and out_probs[at - 1] < prob:
            out_tokens[at], out_probs[at], out_lengths[at] = out_tokens[at - 1], out_probs[at - 1], out_lengths[at - 1]
            at -= 1
        out_tokens[at], out_probs[at], out_lengths[at] = token, prob, length
    return min(size, budget)
