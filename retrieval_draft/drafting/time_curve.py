"""t(n), the time of a forward pass over n tokens, estimated from passes that were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels

__all__ = ["TimeCurve"]

MEASURED_TOGETHER, MEASURED_EACH = 0.2, 0.15
"""Standard deviations of a fresh measurement: of the whole curve, as on a busy machine, and of each size."""

REACH = 2.0
"""Doublings of n over which sizes are alike: of passes that were not tried, those of similar sizes tell."""

_kernels = LazyKernels("retrieval_draft.drafting._kernels.time_curve")


class TimeCurve:
    """Seconds of a pass by number of tokens, at sizes that are powers of two and interpolated between them.

    A Kalman filter over the logarithms of the sizes' seconds. Its drift makes old measurements fade; its
    covariance holds how much one size tells about the others. A time that the filter finds implausible
    changes nothing until another of about the same number of tokens agrees with it; then it is believed, and
    the curve jumps there.

    Args:
        seconds: By number of tokens, for ascending powers of two.

    Example:
        {1: 1.0, 2: 1.2, 4: 1.6}: one time of 8.0 for 4 tokens changes nothing; two make t(4) about 8
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        least: float = _kernels.LEAST_SECONDS
        self._set(tuple(seconds), np.log([max(each, least) for each in seconds.values()]))

    def _set(self, sizes: tuple[int, ...], logs: NDArray[np.float64]) -> None:
        self._sizes = sizes
        self._knots = np.log2(np.array(sizes, np.float64))
        self._logs = logs
        self._alike = np.exp(-np.abs(self._knots[:, None] - self._knots[None]) / REACH)
        self._covariance = MEASURED_TOGETHER**2 + MEASURED_EACH**2 * self._alike
        self._suspected = np.zeros(len(sizes))
        self._table: NDArray[np.float64] = np.empty(0, np.float64)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens that the curve is kept for."""
        return self._sizes

    def extended(self, sizes: Sequence[int]) -> TimeCurve:
        """A copy of the curve, as freshly measured, for other sizes."""
        return TimeCurve(dict(zip(sizes, self.up_to(max(sizes))[np.array(sizes) - 1].tolist(), strict=True)))

    def scaled(self, factor: float) -> TimeCurve:
        """A copy of the curve, as freshly measured, with all its times multiplied by `factor`."""
        other = self.extended(self._sizes)
        other._logs += np.log(factor)
        return other

    def by_size(self) -> dict[int, float]:
        """Seconds by number of tokens; more tokens never cost less."""
        ascending = np.empty_like(self._logs)
        _kernels.ascend(self._logs, self._covariance, ascending)
        return dict(zip(self._sizes, np.exp(ascending).tolist(), strict=True))

    def observe(self, tokens: int, seconds: float) -> bool:
        """Updates the curve by a timed pass.

        Args:
            tokens: Tokens in the pass, at least 1.
            seconds: Its duration, above 0.

        Returns:
            False for a time that is not believed yet.
        """
        is_believed: bool = _kernels.observe(
            self._knots, self._logs, self._covariance, self._alike, self._suspected, tokens, seconds,
            self._table,
        )  # fmt: skip
        return is_believed

    def seconds(self, tokens: int) -> float:
        """t(tokens), interpolated; beyond the last size in the direction of the last two."""
        return float(self.up_to(tokens)[tokens - 1])

    def up_to(self, tokens: int) -> NDArray[np.float64]:
        """t(1), t(2), ... to at least t(tokens): float64, (m,) with m >= tokens. Good until the next pass."""
        if len(self._table) < tokens:
            self._table = np.empty(max(64, 1 << (tokens - 1).bit_length()), np.float64)
            _kernels.fill(self._knots, self._logs, self._covariance, self._table)
        return self._table
