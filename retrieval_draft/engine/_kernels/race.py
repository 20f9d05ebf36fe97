"""Gumbel noise as an exponential race with two levels, so that one token's noise costs no more than one token.

Every token i of a position gets an arrival time E[i], independent, exponential with rate 1; its Gumbel noise is
-log E[i], and the argmax of log p + noise is the token that arrives first when time runs p[i] times as fast.

Of a block of w tokens the first arrival is exponential with rate w, whose it is is uniform, and the others follow
it after times that are exponential with rate 1 again: nothing is remembered. Drawn in this order, a whole block
is known to be too late as soon as its first arrival is.

All random numbers are SplitMix64 (Steele et al., 2014) of a counter, from a key made of seed, sample, position.
"""

from __future__ import annotations

import numpy as np

from retrieval_draft.index._kernels.jit import kernel

__all__ = ["BLOCK", "arrival", "exponential", "first_arrival", "mix", "position_key"]

BLOCK = 256
"""Tokens in a block; the last one of a vocabulary may have fewer."""

STEP = np.uint64(0x9E3779B97F4A7C15)
BLOCKS = np.uint64(0xD1B54A32D192ED03)
"""Sets the numbers that are drawn for blocks apart from those for tokens."""

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
    """An exponential variable with rate 1 from 64 random bits; fine steps near 0, which decides."""
    return -np.log1p(-((random >> np.uint64(11)) + 0.5) * RESOLUTION)


@kernel
def first_arrival(key: np.uint64, block: int, width: int) -> tuple[float, int]:
    """When the first token of a block arrives, and which of its `width` tokens it is."""
    random = mix((key ^ BLOCKS) + np.uint64(block + 1) * STEP)
    chosen = mix(random + STEP) >> np.uint64(32)
    return exponential(random) / width, np.int64((chosen * np.uint64(width)) >> np.uint64(32))


@kernel
def arrival(key: np.uint64, token: int, vocabulary: int) -> float:
    """E[token] at the position that `key` stands for; the Gumbel noise is ``-log`` of it."""
    block = token // BLOCK
    begin = block * BLOCK
    first, winner = first_arrival(key, block, min(BLOCK, vocabulary - begin))
    if token - begin == winner:
        return first
    return first + exponential(mix(key + np.uint64(token + 1) * STEP))
