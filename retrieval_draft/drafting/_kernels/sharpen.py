"""Acceptance probabilities conditioned on the known Gumbel noise, for a guessed distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.race import arrival, position_key

__all__ = ["COLUMNS", "sharpen", "sharpened", "teach_sharpness"]

COLUMNS = 2
"""Columns of evidence: the log odds without regard to the noise, and the shift that the noise adds to
them."""

MAX_SHIFT = 6.0
LEAST_LEFT = 0.001
CERTAIN = 0.999
UNLIKELY = 1e-6
MAX_WEIGHT = 3.0


@kernel
def sharpened(odds: float, shift: float, weight: float, bias: float) -> float:
    """Probability at log odds with the shift of the noise, scaled by a learned weight, and a learned bias."""
    prob = 1.0 / (1.0 + np.exp(-(odds + weight * shift + bias)))
    return min(max(prob, UNLIKELY), CERTAIN)


@kernel
def sharpen(
    first: int,
    siblings: NDArray[np.int32],
    tokens: NDArray[np.int32],
    masks: NDArray[np.int64],
    sample_key: np.uint64,
    position: int,
    vocabulary: int,
    weights: NDArray[np.float64],
    probs: NDArray[np.float64],
    evidence: NDArray[np.float32],
    column: int,
) -> None:
    """Replaces marginal probabilities of all children of one parent by those given the noise.

    The target takes the token with the least arrival time E / p. If the guesses m were the distribution p, a
    child's odds of being that token would rise with m / E against the others' m / E and the mass of tokens
    that no source named, whose noise is not known and counts as 1. At E = 1 these are the odds of m alone;
    the difference is the shift of the noise. A guess may estimate whether the source is right at all instead,
    which does not depend on the noise: the weight of the shift is learned for each set of sources.

    Args:
        first: The first child.
        siblings: int32. The next child of the same parent, or -1.
        tokens: int32. Of each node.
        masks: int64. The set of sources that named each node.
        sample_key: Of the seed and sample.
        position: Of the children's tokens in the text.
        vocabulary: Ids that noise is drawn for.
        weights: float64, shape (sets, 2). The weight of the shift, and a bias.
        probs: float64. Marginal, then given the noise.
        evidence: float32, shape (nodes, columns). Written from `column` on.
        column: First of `COLUMNS` columns.

    Example:
        Two children of 0.5 and 0.4 with E 2 and 0.5 have strengths 0.25 and 0.8 against 0.1 unnamed: the
        second one's log odds rise from -0.41 to log(0.8 / 0.35) = 0.83, if the weight is 1.
    """
    key = position_key(sample_key, position)
    named, strength = 0.0, 0.0
    node = first
    while node >= 0:
        named += probs[node]
        if tokens[node] < vocabulary:
            strength += probs[node] / arrival(key, tokens[node], vocabulary)
        node = siblings[node]
    left = max(1.0 - named, LEAST_LEFT)
    node = first
    while node >= 0:
        prob = min(max(probs[node], UNLIKELY), CERTAIN)
        odds = np.log(prob / (1.0 - prob))
        shift = 0.0
        if tokens[node] < vocabulary:
            own = probs[node] / arrival(key, tokens[node], vocabulary)
            others = max(strength - own, 0.0) + left
            shift = min(max(np.log(own / others) - odds, -MAX_SHIFT), MAX_SHIFT)
        evidence[node, column] = odds
        evidence[node, column + 1] = shift
        probs[node] = sharpened(odds, shift, weights[masks[node], 0], weights[masks[node], 1])
        node = siblings[node]


@kernel
def teach_sharpness(
    odds: float, shift: float, taken: bool, rate: float, mask: int, weights: NDArray[np.float64]
) -> None:
    """One step of logistic regression on the noise weights of a set of sources.

    Args:
        odds: Log odds without the noise.
        shift: Shift by the noise.
        taken: Whether the node was accepted.
        rate: Learning rate.
        mask: The set of sources.
        weights: float64, shape (sets, 2). The weight of the shift, and a bias; changed.
    """
    error = taken - sharpened(odds, shift, weights[mask, 0], weights[mask, 1])
    weights[mask, 0] = min(max(weights[mask, 0] + rate * error * shift, 0.0), MAX_WEIGHT)
    weights[mask, 1] += rate * error
