"""One draw from the few scores of a row that a device has sent, where these decide it.

The scores are the best ones of the row, and those of its candidates: the tokens that come first in a draw
from all. What they leave open is not guessed, so that a draw is always that of `warp.choose` from the whole
row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.race import arrival
from retrieval_draft.engine._kernels.warp import MAX_SCORE, TEMPERATURE, TOP_K, TOP_P

__all__ = ["choose_among"]

TOTAL_ERROR = 2e-5
"""Relative error of a total that a device sums up in float32, and more."""

SUM_ERROR = 1e-12
"""The same of a sum of few in float64, in any order."""

NOISE_ERROR = 1e-6
"""Error of a device's sums of score and noise, and more."""


@kernel
def _in_order(values: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
    """Moves the higher of two tokens forward where their values, which fall, are equal."""
    for index in range(1, values.shape[0]):
        at = index
        while at > 0 and values[at - 1] == values[at] and tokens[at - 1] < tokens[at]:
            tokens[at - 1], tokens[at] = tokens[at], tokens[at - 1]
            at -= 1


@kernel
def _weigh(values: NDArray[np.float32], temperature: np.float32, highest: np.float32) -> NDArray[np.float64]:
    """exp(value / temperature - highest) of each."""
    weights = np.empty(values.shape[0], np.float64)
    for index in range(values.shape[0]):
        weights[index] = np.exp(float(np.float32(values[index] / temperature)) - float(highest))
    return weights


@kernel
def choose_among(
    best: NDArray[np.float32],
    best_tokens: NDArray[np.int32],
    scores: NDArray[np.float32],
    tokens: NDArray[np.int32],
    total: float,
    bound: float,
    vocabulary: int,
    kinds: NDArray[np.int64],
    numbers: NDArray[np.float64],
    keeps: NDArray[np.int64],
    key: np.uint64,
    logprob: bool,
) -> tuple[int, float]:
    """The token that wins the race among those kept, and the logarithm of its probability.

    Args:
        best: float32, shape (m,). The row's largest scores, in falling order; none, or all.
        best_tokens: int32, shape (m,).
        scores: float32, shape (c,). Those of the candidates, -inf for none.
        tokens: int32, shape (c,). The candidates.
        total: Sum of exp(score / temperature - largest) over the row, to `TOTAL_ERROR`; NaN if unknown.
        bound: Score / temperature + noise of the other tokens is at most this, to `NOISE_ERROR`.
        vocabulary: Tokens of the row.
        kinds, numbers, keeps: Operations, as of `warp.choose`; TEMPERATURE is the first of them, or none.
        key: Of the noise at the position.
        logprob: Whether to sum up the probabilities.

    Returns:
        The token, or -1 where it takes the whole row. Its log probability, NaN unless requested.

    Example:
        top-p of 0.9, and the best two scores weigh 0.7 and 0.25 of the total: one of these two wins
    """
    count = best.shape[0]
    # Whether the kept tokens are all among the best; and else, whether others are kept by their score alone.
    closed, by_score = count == vocabulary, True
    least, is_whole = 0.0, True
    temperature = np.float32(1.0)
    start = 0
    if kinds.shape[0] > 0 and kinds[0] == TEMPERATURE:
        temperature, start = np.float32(numbers[0]), 1
    if count == 0 and scores.shape[0] == 0:
        return -1, np.nan
    highest = np.float32((best[0] if count > 0 else scores[0]) / temperature)
    if not abs(highest) <= MAX_SCORE:
        return -1, np.nan
    best, best_tokens = best.copy(), best_tokens.copy()
    _in_order(best, best_tokens)
    weights = _weigh(best, temperature, highest)
    kept = count
    for step in range(start, kinds.shape[0]):
        size, keep = kept, min(keeps[step], vocabulary)
        if kinds[step] == TOP_K:
            k = int(numbers[step])
            if k < kept:
                smallest, size = np.float32(best[k - 1] / temperature), k
                while size < kept and np.float32(best[size] / temperature) == smallest:
                    size += 1
                if size == kept and not closed:
                    return -1, np.nan
            elif not closed:
                by_score = False
        elif kinds[step] == TOP_P:
            whole, error = total, TOTAL_ERROR
            if closed:
                whole, error = weights[:kept].sum(), SUM_ERROR
            elif not is_whole or np.isnan(total):
                return -1, np.nan
            target = whole - numbers[step] * whole
            mass, size = 0.0, 0
            while size < kept and mass < target * (1.0 - error):
                mass += weights[size]
                size += 1
            if mass >= target * (1.0 - error):
                if mass < target * (1.0 + error) and not (closed and size == kept):
                    return -1, np.nan
                if not closed and best[size - 1] == best[kept - 1]:
                    return -1, np.nan
            elif not closed:
                by_score = False
        else:
            size = 0
            while size < kept and weights[size] >= numbers[step]:
                size += 1
            if size == kept:
                least = max(least, numbers[step])
        is_whole = False
        if size < keep:
            # Equal scores beyond the best may have higher ids.
            if not closed and (keep > kept or best[keep - 1] == best[kept - 1]):
                return -1, np.nan
            size = min(keep, kept)
        closed = closed or size < kept
        kept = size
    token, first, score = -1, -np.inf, np.float32(0.0)
    if closed:
        for index in range(kept):
            sum_ = float(np.float32(best[index] / temperature))
            sum_ -= np.log(arrival(key, best_tokens[index], vocabulary))
            if sum_ > first or token < 0:
                token, first, score = best_tokens[index], sum_, best[index]
        if not logprob:
            return token, np.nan
        return token, float(np.float32(score / temperature)) - float(highest) - np.log(weights[:kept].sum())
    if logprob:
        return -1, np.nan
    unknown = bound + NOISE_ERROR * (1.0 + abs(bound))
    for index in range(scores.shape[0]):
        if scores[index] == -np.inf:
            continue
        divided = float(np.float32(scores[index] / temperature))
        sum_ = divided - np.log(arrival(key, tokens[index], vocabulary))
        is_kept = least == 0.0 and by_score
        for other in range(count):
            is_kept = is_kept or best_tokens[other] == tokens[index]
        if not is_kept and by_score:
            is_kept = np.exp(divided - float(highest)) >= least
            if not is_kept:
                continue
        if not is_kept:
            unknown = max(unknown, sum_)
        elif sum_ > first:
            token, first = tokens[index], sum_
    return (token, np.nan) if first > unknown else (-1, np.nan)
