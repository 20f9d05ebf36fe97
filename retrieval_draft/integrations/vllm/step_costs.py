"""Lengths of drafts that pay in vLLM, learned from the times between its calls."""

from __future__ import annotations

from collections import Counter
from statistics import median

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.cost import SIZES, CostModel

__all__ = ["StepCosts"]

ASSUMED = (1.0, 1.25, 1.3, 1.45, 1.9, 3.5, 6.8)
"""t(n) over t(1) before anything was timed, for n of `SIZES`: float32 on two CPU cores. A GPU's curve is
flatter, and is learned from the first requests."""

PLAIN_FIRST = 5
PLAIN_MOST = 20
"""Number of timed steps without drafts, or of any kind, whose median sets the assumed curve's scale."""

PLAIN_AGAIN = (16, 256)
"""Numbers of steps with drafts and none without after which one verifies nothing, so that the cost of drafts
stays known: the first, doubled each time, up to the last."""

DRAFTS_AGAIN = (64, 1024)
"""Numbers of timed steps without drafts after which likely ones are verified once, so that the estimate of
their cost is tested: the first, doubled each time, up to the last."""

MIN_PROB_STEPS = 16
"""Steps for which the smallest probability is kept: computing it takes a tenth as long as the other work."""

LIKELY = 0.5
"""Smallest path probability of drafts verified for that test."""

LONGEST = 3.0
"""Limit of a step's time over that of the curve: a stalled machine is not a slow model."""


class StepCosts:
    """t(n), the time of a step over n tokens, and the number of drafts of each row that pays.

    A step's time lies between the end of one call and the beginning of the next: forward pass, sampling,
    scheduling and output together, which a draft adds to. A draft pays if it raises this step's own tokens a
    second; comparison with the recent rate, as in `CostModel`, gave 6% less in replayed requests, whose
    repetitive parts make everything before them look too slow. Curves are kept by number of rows, rounded up
    to a power of two.

    Example:
        one row, path probabilities [.9, .8, .1], t(4) = 1.2 t(1): two or three drafts; [.1] alone: none
    """

    def __init__(self) -> None:
        self._curves: dict[int, CostModel] = {}
        self._first: list[float] = []
        self._drafted: Counter[int] = Counter()
        self._wait = PLAIN_AGAIN[0]
        self._asked = 0
        self._without: Counter[int] = Counter()
        self._wait_to_draft = DRAFTS_AGAIN[0]
        self._min_probs: dict[tuple[int, int], tuple[int, float]] = {}

    def seconds_by_size(self, rows: int = 1) -> dict[int, float]:
        """The present curve for so many rows: seconds by number of tokens; empty before any step."""
        bucket = _bucket(rows)
        return self._curves[bucket].seconds_by_size() if bucket in self._curves else {}

    def min_prob(self, rows: int, most: int) -> float:
        """Smallest path probability with which a draft can pay: shorter chains are found faster.

        The last draft of the best choice yields its path probability, and costs one more token at the rate of
        that step, which is at least the rate without drafts. The probability is computed every few steps.

        Args:
            rows: Number of rows in the batch.
            most: Limit of a row's draft tokens.
        """
        if self._is_due(_bucket(rows)):
            return 0.0
        asked, min_prob = self._min_probs.get((rows, most), (MIN_PROB_STEPS, 0.0))
        if asked >= MIN_PROB_STEPS:
            seconds = self._curve(rows).seconds_up_to(rows * (most + 1))[rows - 1 :]
            asked, min_prob = 0, float(rows / seconds[0] * np.diff(seconds).min())
        self._min_probs[rows, most] = asked + 1, min_prob
        return min_prob

    def choose(
        self, path_probs: NDArray[np.float32], lengths: NDArray[np.int32], context: int
    ) -> NDArray[np.int32]:
        """Number of drafts of each row to verify. All rows compete for the time of a longer pass.

        Args:
            path_probs: float32, shape (rows, most). P(accepted up to here), decreasing along each row, 0
                after its drafts.
            lengths: int32, shape (rows,). Drafts of each row.
            context: Tokens of the longest text.

        Returns:
            int32, shape (rows,), each in 0..lengths.
        """
        rows, most = path_probs.shape
        count = int(lengths.sum())
        if not count:
            return lengths
        if self._is_plain(_bucket(rows)):
            return np.zeros_like(lengths)
        # Equal ones in the order of rows and depths, so that each row's choice is a prefix.
        probs = path_probs.ravel()
        order = np.argsort(-probs, kind="stable")[:count]
        paying = self._curve(rows).choose(probs[order], context, rows)
        if not paying and self._is_due(_bucket(rows)):
            paying = int(np.count_nonzero(probs[order] >= LIKELY))
            if paying:
                self._without[_bucket(rows)] = 0
                self._wait_to_draft = min(2 * self._wait_to_draft, DRAFTS_AGAIN[1])
        return np.bincount(order[:paying] // most, minlength=rows).astype(np.int32)

    def observe(self, rows: int, tokens: int, context: int, seconds: float) -> None:
        """Records a step that only verified drafts.

        Args:
            rows: Number of rows in the batch.
            tokens: Tokens in the pass: one for each row, and its drafts.
            context: Tokens of the longest text.
            seconds: Its duration.
        """
        if seconds <= 0:
            return
        curve = self._curve(rows)
        bucket = _bucket(rows)
        self._drafted[bucket] = 0 if tokens == rows else self._drafted[bucket] + 1
        self._without[bucket] = self._without[bucket] + 1 if tokens == rows else 0
        if len(self._first) < PLAIN_FIRST:
            self._first.append(seconds / float(np.interp(tokens, SIZES, ASSUMED)))
            scale = median(self._first)
            self._curves = {1: CostModel()}
            self._curves[1].load({n: scale * share for n, share in zip(SIZES, ASSUMED, strict=True)})
            return
        curve.observe(tokens, context, min(seconds, LONGEST * curve.seconds(tokens)))

    def _is_due(self, bucket: int) -> bool:
        """True if drafts are to be tried after a long time without them."""
        return self._without[bucket] >= self._wait_to_draft

    def _is_plain(self, bucket: int) -> bool:
        """True if the next step is to verify nothing. Each reason holds for a few calls, timed or not."""
        if len(self._first) < PLAIN_FIRST and self._asked < PLAIN_MOST:
            self._asked += 1
            return True
        if self._drafted[bucket] < self._wait:
            return False
        self._drafted[bucket] = 0
        self._wait = min(2 * self._wait, PLAIN_AGAIN[1])
        return True

    def _curve(self, rows: int) -> CostModel:
        bucket = _bucket(rows)
        if 1 not in self._curves:
            self._curves[1] = CostModel()
            self._curves[1].load(dict(zip(SIZES, ASSUMED, strict=True)))
        if bucket not in self._curves:
            self._curves[bucket] = self._curves[1].for_rows(bucket)
        return self._curves[bucket]


def _bucket(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()
