"""Gumbel noise as an exponential race with two levels: one token's noise costs no more than one token.

Every token i of a position gets an arrival time E[i], independent, exponential with rate 1; its Gumbel noise
is -log E[i], and the argmax of log p + noise is the token that arrives first when time runs p[i] times as
fast.

Of a block of w tokens the first arrival is exponential with rate w, its token is uniform, and the others
follow it after times that are exponential with rate 1 again (memorylessness). Drawn in this order, a whole
block is known to be too late as soon as its first arrival is.

All random numbers are SplitMix64 (Steele et al., 2014) of a counter, from a key of seed, sample, position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["BLOCK", "arrival", "exponential", "first_arrival", "mix", "noise_of", "position_key", "race"]

BLOCK = 256
"""Tokens in a block; the last one of a vocabulary may have fewer."""

STEP = np.uint64(0x9E3779B97F4A7C15)
BLOCKS = np.uint64(0xD1B54A32D192ED03)
"""Separates the random numbers of blocks from those of tokens."""

MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
RESOLUTION = 2.0**-53


@kernel
def mix(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64."""
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    return value ^ (value >> np.uint64(31))


@kernel
def position_key(sample_key: np.uint64, position: int) -> np.uint64:
    """The key of one position's noise, from that of a seed and sample."""
    return mix(sample_key + np.uint64(position + 1) * STEP)


@kernel
def exponential(random: np.uint64) -> float:
    """An exponential variable with rate 1 from 64 random bits; fine steps near 0, where races are decided."""
    return -np.log1p(-((random >> np.uint64(11)) + 0.5) * RESOLUTION)


@kernel
def _block_random(key: np.uint64, block: int) -> np.uint64:
    """The random bits from which a block's first arrival is made."""
    return mix((key ^ BLOCKS) + np.uint64(block + 1) * STEP)


@kernel
def first_arrival(key: np.uint64, block: int, width: int) -> tuple[float, int]:
    """Arrival time of a block's first token, and its index among the block's `width` tokens."""
    random = _block_random(key, block)
    chosen = mix(random + STEP) >> np.uint64(32)
    return exponential(random) / width, np.int64((chosen * np.uint64(width)) >> np.uint64(32))


@kernel
def arrival(key: np.uint64, token: int, vocabulary: int) -> float:
    """E[token] at the position of `key`; the Gumbel noise is ``-log`` of it."""
    block = token // BLOCK
    begin = block * BLOCK
    first, winner = first_arrival(key, block, min(BLOCK, vocabulary - begin))
    if token - begin == winner:
        return first
    return first + exponential(mix(key + np.uint64(token + 1) * STEP))


@kernel
def noise_of(key: np.uint64, tokens: NDArray[np.int64], vocabulary: int, out: NDArray[np.float32]) -> None:
    """Gumbel noise of some tokens.

    Args:
        key: Of the position.
        tokens: int64, shape (n,).
        vocabulary: Number of token ids.
        out: float32, shape (n,). Written.
    """
    for index in range(tokens.shape[0]):
        out[index] = np.float32(-np.log(arrival(key, tokens[index], vocabulary)))


@kernel
def race(
    row: NDArray[np.float32],
    maxima: NDArray[np.float32],
    temperature: np.float32,
    threshold: np.float32,
    tie: int,
    key: np.uint64,
) -> int:
    """The token with the largest score / temperature + noise, found without drawing most of the noise.

    A block whose largest score and first arrival together stay below the best so far holds no winner, and a
    token whose own score does so with its block's first arrival does not win. The block of the largest score
    comes first, so that the best is high early.

    Args:
        row: float32, shape (vocabulary,). Scores without NaN, of which one is finite and none +inf.
        maxima: float32, shape (blocks,). The largest score of each block.
        temperature: Divides the scores.
        threshold: Tokens with a lower score are out.
        tie: Tokens with a score equal to the threshold and a lower id are out.
        key: Of the position.

    Returns:
        The token.

    Example:
        For ``[2.0, 1.0, -inf]``, temperature 1 and arrivals ``[3.0, 0.1, 0.2]`` the noise is
        ``[-1.1, 2.3, 1.6]``: token 1 wins with 3.3 against 0.9.
    """
    size = row.shape[0]
    top = 0
    for block in range(1, maxima.shape[0]):
        if maxima[block] > maxima[top]:
            top = block
    best, token = -np.inf, -1
    for turn in range(-1, maxima.shape[0]):
        block = top if turn < 0 else turn
        if turn == top or maxima[block] < threshold:
            continue
        begin = block * BLOCK
        end = min(begin + BLOCK, size)
        highest = float(maxima[block] / temperature)
        gap = highest - best
        if gap < -44.0:  # arrivals are not before 2^-54 / 256, so noise is below 44
            continue
        # An exponential is no less than the uniform it is made from: most blocks need no logarithm.
        uniform = ((_block_random(key, block) >> np.uint64(11)) + 0.5) * RESOLUTION
        if gap < 0.0 and uniform > (end - begin) * np.exp(gap):
            continue
        first, winner = first_arrival(key, block, end - begin)
        bound = -np.log(first)
        if highest + bound < best:
            continue
        for column in range(begin, end):
            score = row[column]
            if score < threshold or (score == threshold and column < tie):
                continue
            value = float(score / temperature)
            if value + bound < best:
                continue
            if column - begin == winner:
                value += bound
            else:
                value -= np.log(first + exponential(mix(key + np.uint64(column + 1) * STEP)))
            if value > best or token < 0:
                best, token = value, column
    return token
