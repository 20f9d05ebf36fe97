"""How long drafts pay in vLLM, learned from the times between its calls."""

from __future__ import annotations

from statistics import median

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.engine.cost import SIZES, CostModel

__all__ = ["StepCosts"]

ASSUMED = (1.0, 1.15, 1.2, 1.35, 2.0, 3.6, 7.0)
"""t(n) over t(1) before anything was timed, for n of `SIZES`: float32 on two CPU cores. A GPU's curve is
flatter, and is learned from the first requests."""

SETTLING = 8
"""Steps whose median sets the scale of the assumed curve."""

LONGEST = 3.0
"""A step counts as this many times what the curve says at most: a stalled machine is not a slow model."""


class StepCosts:
    """t(n), the time a step over n tokens takes, and how many drafts of each row are worth it.

    A step's time lies between the end of one call and the beginning of the next: forward pass, sampling,
    scheduling and output together, which is what a draft has to pay for. Curves are kept by number of rows,
    rounded up to a power of two.

    Example:
        one row, path probabilities [.9, .8, .1], t(4) = 1.2 t(1): two or three drafts; [.1] alone: none
    """

    def __init__(self) -> None:
        self._curves: dict[int, CostModel] = {}
        self._first: list[float] = []

    def seconds_by_size(self, rows: int = 1) -> dict[int, float]:
        """The curve for so many rows as it stands: seconds by number of tokens; empty before any step."""
        bucket = _bucket(rows)
        return self._curves[bucket].seconds_by_size() if bucket in self._curves else {}

    def choose(
        self, path_probs: NDArray[np.float32], lengths: NDArray[np.int32], context: int
    ) -> NDArray[np.int32]:
        """How many drafts of each row to verify. Rows compete for what a longer pass costs.

        Args:
            path_probs: float32, shape (rows, most). P(accepted up to here), falling along each row, 0 behind
                its drafts.
            lengths: int32, shape (rows,). Drafts of each row.
            context: Tokens of the longest text.

        Returns:
            int32, shape (rows,), each in 0..lengths.
        """
        rows, most = path_probs.shape
        count = int(lengths.sum())
        if not count:
            return lengths
        # Equal ones in the order of their rows and depths, so that what is chosen of a row is its beginning.
        probs = path_probs.ravel()
        order = np.argsort(-probs, kind="stable")[:count]
        worth = self._curve(rows).choose(probs[order], context, rows)
        return np.bincount(order[:worth] // most, minlength=rows).astype(np.int32)

    def observe(self, rows: int, tokens: int, emitted: int, context: int, seconds: float) -> None:
        """Takes note of a step in which nothing but drafts was verified.

        Args:
            rows: In the batch.
            tokens: In the pass: one for each row, and its drafts.
            emitted: It yielded.
            context: Tokens of the longest text.
            seconds: It took.
        """
        if seconds <= 0:
            return
        curve = self._curve(rows)
        if len(self._first) < SETTLING:
            self._first.append(seconds / float(np.interp(tokens, SIZES, ASSUMED)))
            scale = median(self._first)
            self._curves = {1: CostModel()}
            self._curves[1].load({n: scale * share for n, share in zip(SIZES, ASSUMED, strict=True)})
            return
        seconds = min(seconds, LONGEST * curve.seconds(tokens))
        curve.observe(tokens, context, seconds)
        curve.note_step(emitted, seconds, seconds)

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
