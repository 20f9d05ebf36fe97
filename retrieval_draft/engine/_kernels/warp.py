"""One draw from a row of scores under temperature, top-k, top-p and min-p, neither sorting nor copying it.

These keep a prefix of the tokens in decreasing order. So only a superset of that prefix is collected,
above a threshold that is known to be low enough: the k-th largest block maximum for top-k; for top-p a
threshold that is lowered until the mass above it suffices. The smallest token kept is found there by
selection (Hoare, 1961, "Find"). Among equal scores the higher id counts as the larger, which is how a stable
ascending sort has it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.race import race
from retrieval_draft.engine._kernels.maxima import BLOCK, block_maxima, has_nan
from retrieval_draft.engine._kernels.softmax import exp_sum

__all__ = ["MIN_P", "TEMPERATURE", "TOP_K", "TOP_P", "choose"]

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0, 1, 2, 3

Held = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float64]]
"""Scores held for a closer look, their tokens and weights; the first so many are kept."""

LOWEST = np.float32(-3.4028235e38)

MAX_SCORE = np.float32(2.0**30)
"""From here on, neighbouring float32 are further apart than any noise. Processors make scores so large of
infinity (`remove_invalid_values`): they are drawn from in torch, after the largest is subtracted."""


@kernel
def choose(
    row: NDArray[np.float32],
    bits: NDArray[np.int32],
    maxima: NDArray[np.float32],
    order: NDArray[np.int32],
    kinds: NDArray[np.int64],
    numbers: NDArray[np.float64],
    keeps: NDArray[np.int64],
    values: NDArray[np.float32],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float64],
    key: np.uint64,
    noisy: bool,
    logprob: bool,
) -> tuple[int, float]:
    """The token that wins the race among those kept, and the logarithm of its probability.

    Args:
        row: float32, shape (vocabulary,).
        bits: int32, the memory of `row`.
        maxima, order: float32 and int32 of the same memory, shape (blocks,). Scratch.
        kinds: int64, shape (n,). Operations, in this order; TEMPERATURE at most once.
        numbers: float64, shape (n,). Temperature, k, 1 - top_p or min_p.
        keeps: int64, shape (n,). Tokens that stay in any case, at least 1.
        values, tokens, weights: Shape (vocabulary,), or (0,) where TEMPERATURE is all there is. Scratch.
        key: Of the noise at the position.
        noisy: Whether there is noise; without it the lowest id of the largest score wins.
        logprob: Whether to sum up the probabilities.

    Returns:
        The token, or -1 where the row has NaN or +inf, or has them after division, or where one is to be
        drawn from a row of -inf or from scores beyond MAX_SCORE; without noise the former is 0, as argmax has
        it. Its log probability, NaN unless requested.
    """
    largest, smallest = block_maxima(bits, order)
    top = maxima.max()
    if has_nan(largest, smallest) or top == np.inf:
        return -1, np.nan
    if top == -np.inf:
        return -1 if noisy else 0, np.nan
    held = (values, tokens, weights)
    temperature = np.float32(1.0)
    # The first so many of values are kept; -1 for all of the row. No literal, for which numba would compile
    # every function that it is passed to once more.
    count = np.int64(-1)
    for step in range(kinds.shape[0]):
        if kinds[step] == TEMPERATURE:
            temperature = np.float32(numbers[step])
            if not np.isfinite(np.float32(top / temperature)):
                return -1, np.nan
        elif kinds[step] == TOP_K:
            count = _top_k(row, maxima, temperature, int(numbers[step]), held, count)
        elif kinds[step] == TOP_P:
            count = _top_p(row, maxima, top, temperature, numbers[step], keeps[step], held, count)
        else:
            count = _min_p(row, maxima, top, temperature, numbers[step], keeps[step], held, count)
    highest = np.float32(top / temperature)
    if noisy and abs(highest) > MAX_SCORE:
        return -1, np.nan
    threshold, tie = LOWEST, 0
    if count >= 0:
        threshold, tie = _last(held, count)
    token = race(row, maxima, temperature, threshold, tie, key) if noisy else _first(row, maxima, top)
    if not logprob:
        return token, np.nan
    total = _weigh(held, count, temperature, highest) if count >= 0 else exp_sum(row, temperature, highest)
    return token, float(np.float32(row[token] / temperature)) - float(highest) - np.log(total)


@kernel
def _first(row: NDArray[np.float32], maxima: NDArray[np.float32], top: np.float32) -> int:
    """The lowest token with the largest score."""
    block = 0
    while maxima[block] != top:
        block += 1
    token = block * BLOCK
    while row[token] != top:
        token += 1
    return token


@kernel
def _last(held: Held, count: int) -> tuple[np.float32, int]:
    """The smallest score of those kept, and the lowest token that has it."""
    values, tokens, _ = held
    value, token = values[0], tokens[0]
    for index in range(1, count):
        if values[index] < value or (values[index] == value and tokens[index] < token):
            value, token = values[index], tokens[index]
    return value, token


@kernel
def _gather(
    row: NDArray[np.float32],
    maxima: NDArray[np.float32],
    threshold: np.float32,
    held: Held,
) -> int:
    """Writes all scores of at least `threshold`, -inf left out, and returns their number."""
    values, tokens, _ = held
    threshold = max(threshold, LOWEST)
    count = 0
    for block in range(maxima.shape[0]):
        if maxima[block] < threshold:
            continue
        for token in range(block * BLOCK, min(block * BLOCK + BLOCK, row.shape[0])):
            if row[token] >= threshold:
                values[count], tokens[count] = row[token], token
                count += 1
    return count


@kernel
def _weigh(
    held: Held,
    count: int,
    temperature: np.float32,
    highest: np.float32,
) -> float:
    """Writes exp(value / temperature - highest), and returns their sum."""
    values, _, weights = held
    total = 0.0
    for index in range(count):
        weights[index] = np.exp(float(np.float32(values[index] / temperature)) - float(highest))
        total += weights[index]
    return total


@kernel
def _swap(held: Held, a: int, b: int) -> None:
    values, tokens, weights = held
    values[a], values[b] = values[b], values[a]
    tokens[a], tokens[b] = tokens[b], tokens[a]
    weights[a], weights[b] = weights[b], weights[a]


@kernel
def _select(
    held: Held,
    count: int,
    target: float,
) -> int:
    """Moves the largest to the front and returns how many of them weigh `target` together; 1 at least.

    Args:
        held: Reordered; of equal values the higher token is the larger.
        count: Number of scores, at least 1.
        target: If all together weigh less, it takes all.

    Example:
        For values ``[1, 9, 5]``, weights ``[.1, .6, .3]`` and target 0.8 it takes two: 9 and 5.
    """
    values, tokens, weights = held
    low, high, reached = 0, count, 0.0
    while high - low > 1:
        last = high - 1
        _swap(held, (low + high) // 2, last)
        value, token = values[last], tokens[last]
        split, mass = low, 0.0
        for index in range(low, last):
            if values[index] > value or (values[index] == value and tokens[index] > token):
                mass += weights[index]
                _swap(held, index, split)
                split += 1
        _swap(held, split, last)
        if split > low and reached + mass >= target:
            high = split
        elif reached + mass + weights[split] >= target:
            return split + 1
        else:
            reached += mass + weights[split]
            low = split + 1
    return min(low + 1, count)


@kernel
def _top_k_threshold(
    maxima: NDArray[np.float32],
    k: int,
    held: Held,
) -> np.float32:
    """A value that the k largest scores reach: the k-th largest block maximum, or -inf."""
    values, tokens, weights = held
    blocks = maxima.shape[0]
    if k > blocks:
        return np.float32(-np.inf)
    for block in range(blocks):
        values[block], tokens[block], weights[block] = maxima[block], block, 1.0
    kept = _select(held, blocks, float(k))
    return _last(held, kept)[0]


@kernel
def _at_least(held: Held, count: int, k: int) -> int:
    """Moves the k largest of `count` to the front and returns their number."""
    weights = held[2]
    if k >= count:
        return count
    for index in range(count):
        weights[index] = 1.0
    return _select(held, count, float(k))


@kernel
def _top_k(
    row: NDArray[np.float32],
    maxima: NDArray[np.float32],
    temperature: np.float32,
    k: int,
    held: Held,
    count: int,
) -> int:
    """Keeps the k largest and all that equal the smallest of them once divided, as TopKLogitsWarper does."""
    values = held[0]
    if count < 0:
        threshold = _top_k_threshold(maxima, k, held)
        # Scores a few steps of float32 apart can be equal once divided.
        threshold = np.float32(threshold - abs(threshold) * np.float32(5e-7))
        count = _gather(row, maxima, threshold, held)
    kept = _at_least(held, count, k)
    if kept < count:
        least = np.float32(_last(held, kept)[0] / temperature)
        for index in range(kept, count):
            if np.float32(values[index] / temperature) == least:
                _swap(held, index, kept)
                kept += 1
    return kept


@kernel
def _top_p(
    row: NDArray[np.float32],
    maxima: NDArray[np.float32],
    top: np.float32,
    temperature: np.float32,
    rest: float,
    keep: int,
    held: Held,
    count: int,
) -> int:
    """Drops the smallest tokens that weigh at most `rest` together, as TopPLogitsWarper does."""
    highest = np.float32(top / temperature)
    if count >= 0:
        total = _weigh(held, count, temperature, highest)
        target = total - rest * total
    else:
        total = exp_sum(row, temperature, highest)
        target = total - rest * total
        threshold = np.float32(np.inf)
        if keep > 1:
            threshold = _top_k_threshold(maxima, keep, held)
        depth = 4.0
        while True:
            # Beyond 100 nats a float32 probability is 0.
            count = _gather(row, maxima, min(threshold, np.float32(top - depth * temperature)), held)
            if _weigh(held, count, temperature, highest) >= target or depth > 100.0:
                break
            depth *= 1.5
    kept = _select(held, count, target)
    return kept if kept >= keep else _at_least(held, count, keep)


@kernel
def _min_p(
    row: NDArray[np.float32],
    maxima: NDArray[np.float32],
    top: np.float32,
    temperature: np.float32,
    share: float,
    keep: int,
    held: Held,
    count: int,
) -> int:
    """Drops tokens less probable than `share` of the most probable one, as MinPLogitsWarper does."""
    weights = held[2]
    if count < 0:
        # A little lower than the threshold, which is rounded elsewhere.
        threshold = np.float32(top + (np.log(share) - 0.001) * temperature - abs(top) * 1e-6)
        if keep > 1:
            threshold = min(threshold, _top_k_threshold(maxima, keep, held))
        count = _gather(row, maxima, threshold, held)
    _weigh(held, count, temperature, np.float32(top / temperature))
    kept = 0
    for index in range(count):
        if weights[index] >= share:
            _swap(held, index, kept)
            kept += 1
    return kept if kept >= keep else _at_least(held, count, keep)
