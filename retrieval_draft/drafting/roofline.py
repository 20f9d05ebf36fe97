"""Draft length at the knee of a roofline: what a pass computes in the time of reading its weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.cost import SIZES, CostModel

__all__ = ["RooflineCost"]

MOST = 192
MOST_BY_ROWS = ((1, 32), (3, 64), (6, 96))
"""Tokens of a pass at most, in all and up to so many rows: what pays beyond them is found too seldom."""


class RooflineCost(CostModel):
    """Passes of as many tokens as cost no more than reading the weights, however probable the drafts are.

    Below its knee a pass takes the time of its memory traffic, t(1); beyond it that of its arithmetic, which
    is in proportion to its tokens: here the slope of the measured curve at its end. The rows of a batch share
    the tokens. Rule and limits are those of SSSD (Marzollo et al. 2024, arXiv:2411.05894), which divides
    measured FLOP/s by bytes/s instead, as 16-bit weights take two operations a token and two bytes.

    Example:
        t(1) = 1, t(32) = 4, t(64) = 8: an eighth a token, so 8 tokens, of which 7 are drafts
    """

    @property
    def knee(self) -> float:
        """Tokens at which arithmetic takes as long as reading the weights."""
        low, high = SIZES[-2:]
        slope = (self.seconds(high) - self.seconds(low)) / (high - low)
        return self.seconds(1) / slope if slope > 0 else math.inf

    def best(
        self,
        path_probs: NDArray[np.float32],
        rows: int = 1,
        carried: int | None = None,
        passed: NDArray[np.int64] | None = None,
    ) -> int:
        """Number of draft nodes, of all rows, to verify; see `CostModel.choose`."""
        if not self.is_measured:
            return 0
        most = next((tokens for up_to, tokens in MOST_BY_ROWS if rows <= up_to), MOST)
        each = int(min(self.knee, most)) // rows - 1 - (carried or 0)
        return min(len(path_probs), rows * max(each, 0))

    def _or_trial(self, best: int, most: int) -> int:
        """The best number: the knee needs no trials."""
        return best
