"""Length of a draft that pays best, from the times between an engine's calls."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.cost import SIZES, CostModel

__all__ = ["PassCosts"]

ASSUMED = (1.0, 1.3, 1.6, 2.1, 3.2, 5.6, 10.5)
"""t(n) over t(1) before anything was timed, for n of `SIZES`: a quantised model on a CPU."""

FIRST = 8
"""Limit of draft tokens while no pass was timed: acceptable on every machine."""


class PassCosts:
    """t(n), the time an engine takes for n tokens, learned from its real passes only.

    The first pass gives the scale of an assumed curve, the later ones correct its shape.

    Example:
        nothing timed: choose([.9, .8, .1])  ->  2, as long as more is expected than a tenth of a pass
    """

    def __init__(self) -> None:
        self._curve = CostModel()

    @property
    def is_timed(self) -> bool:
        """True if any pass was timed."""
        return self._curve.is_measured

    def seconds_by_size(self) -> dict[int, float]:
        """The present curve: seconds by number of tokens; empty before the first pass."""
        return self._curve.seconds_by_size()

    def load(self, seconds: dict[int, float]) -> None:
        """Sets the curve from measured seconds for every size of `SIZES`."""
        self._curve.load(seconds)

    def choose(self, path_probs: NDArray[np.float32], length: int) -> int:
        """Number of tokens of a draft to verify.

        Args:
            path_probs: float32, shape (n,). P(accepted up to here), decreasing.
            length: Tokens of the text.

        Returns:
            0..n.
        """
        if self.is_timed:
            return self._curve.choose(path_probs, length)
        rate = np.diff(np.interp(np.arange(1, len(path_probs) + 2), SIZES, ASSUMED))
        pays = np.flatnonzero(path_probs <= rate)
        return min(FIRST, int(pays[0]) if len(pays) else len(path_probs))

    def observe(self, tokens: int, emitted: int, length: int, seconds: float) -> None:
        """Records a pass.

        Args:
            tokens: Tokens in the pass, the last of the text included.
            emitted: Tokens it yielded.
            length: Tokens of the text.
            seconds: Time from the draft to the next call.
        """
        if seconds <= 0:
            return
        if not self.is_timed:
            scale = seconds / float(np.interp(tokens, SIZES, ASSUMED))
            self._curve.load({size: scale * share for size, share in zip(SIZES, ASSUMED, strict=True)})
        self._curve.observe(tokens, length, seconds)
        self._curve.note_step(emitted, seconds, seconds)
