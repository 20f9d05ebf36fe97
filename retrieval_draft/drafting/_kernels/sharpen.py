"""What the noise that will draw a token says about who wins, where the law it is drawn from is guessed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.race import arrival, position_key

__all__ = ["COLUMNS", "sharpen", "sharpened", "teach_sharpness"]

COLUMNS = 2
"""Columns of evidence: the log odds without regard to the noise, and what the noise adds to them."""

MAX_SHIFT = 6.0
LEAST_LEFT = 0.001
CERTAIN = 0.999
UNLIKELY = 1e-6
MAX_WEIGHT = 3.0


@kernel
def sharpened(odds: float, shift: float, weight: float, bias: float) -> float:
    """Probability at log odds shifted by what the noise says, as far as it is believed."""
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

    The target takes the token with the least arrival time E / p. Were the guesses m the law p, a child's odds
    to be it would rise with m / E against the others' m / E and the mass that nobody named, whose noise is
    not known and counts as 1. At E = 1 these are the odds of m alone; the difference is what the noise says.
    A guess may stand for "is this source right at all" instead, of which the noise knows nothing: how much
    of the difference counts is learned for each set of sources.

    Args:
        first: The first child.
        siblings: int32. The next child of the same parent, or -1.
        tokens: int32. Of each node.
        masks: int64. The set of sources that named each node.
        sample_key: Of the seed and sample.
        position: Of the children's tokens in the text.
        vocabulary: Ids that noise is drawn for.
        weights: float64, shape (sets, 2). How far the noise is believed, and a bias.
        probs: float64. Marginal, then given the noise.
        evidence: float32, shape (nodes, columns). Written from `column` on.
        column: First of `COLUMNS` columns.

    Example:
        Two children of 0.5 and 0.4 with E 2 and 0.5 have strengths 0.25 and 0.8 against 0.1 unnamed: the
        second one's log odds rise from -0.41 to log(0.8 / 0.35) = 0.83, if the noise is wholly believed.
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
    """One step of logistic regression for what a set of sources makes of the noise."""
    error = taken - sharpened(odds, shift, weights[mask, 0], weights[mask, 1])
    weights[mask, 0] = min(max(weights[mask, 0] + rate * error * shift, 0.0), MAX_WEIGHT)
    weights[mask, 1] += rate * error
