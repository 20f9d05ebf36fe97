"""t(n), the time of a forward pass over n tokens, estimated from passes that were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["TimeCurve"]

NOISE = 0.1
"""Standard deviation of one pass's time, in natural logarithms as all below."""

MEASURED_TOGETHER, MEASURED_EACH = 0.2, 0.15
"""Of a fresh measurement: of the whole curve, as on a busy machine, and of each size."""

DRIFT_TOGETHER, DRIFT_EACH = 0.15, 0.04
"""Drift in one second of passes: a longer context, a warmer machine, another process beside this one."""

REACH = 2.0
"""Doublings of n over which sizes are alike: of passes that were not tried, those of similar sizes tell."""

SUSPICIOUS = 3.0
"""Standard deviations from which a time is an outlier, unless the next of its size agrees with it."""

MOST_VARIANCE = 4.0
LEAST_SECONDS, LONGEST_SECONDS = 1e-9, 1e6
DRIFTED_SECONDS = 10.0
"""A pass that took longer counts as so long for the drift: a machine that slept."""


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
        self._set(tuple(seconds), np.log([max(each, LEAST_SECONDS) for each in seconds.values()]))

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
        other = TimeCurve.__new__(TimeCurve)
        logs = np.log(self.up_to(max(sizes))[np.array(sizes) - 1])
        other._set(tuple(sizes), logs)
        return other

    def scaled(self, factor: float) -> TimeCurve:
        """A copy of the curve, as freshly measured, with all its times multiplied by `factor`."""
        other = self.extended(self._sizes)
        other._logs = other._logs + np.log(factor)
        return other

    def by_size(self) -> dict[int, float]:
        """Seconds by number of tokens; more tokens never cost less."""
        return dict(zip(self._sizes, np.exp(self._ascending()).tolist(), strict=True))

    def observe(self, tokens: int, seconds: float) -> bool:
        """Updates the curve by a timed pass.

        Args:
            tokens: Tokens in the pass, at least 1.
            seconds: Its duration, above 0.

        Returns:
            False for a time that is not believed yet.
        """
        position = min(float(np.log2(tokens)), float(self._knots[-1]))
        weights = np.maximum(0.0, 1.0 - np.abs(self._knots - position))
        weights /= weights.sum()
        passed = min(seconds, DRIFTED_SECONDS)
        self._covariance += passed * (DRIFT_TOGETHER**2 + DRIFT_EACH**2 * self._alike)
        error = float(np.log(max(seconds, LEAST_SECONDS))) - self._log_seconds(tokens)
        towards = self._covariance @ weights
        variance = float(weights @ towards) + NOISE**2
        knot = int(weights.argmax())
        before, self._suspected[knot] = self._suspected[knot], 0.0
        if error * error > SUSPICIOUS**2 * variance:
            if error * before <= 0:
                self._suspected[knot] = error
                return False
            error = float(np.sign(error)) * min(abs(error), abs(before))
            # Wide enough for the error: what is known well keeps its place more than what is not.
            wider = max(error * error / variance, 1.0)
            self._covariance *= wider
            towards *= wider
            variance = (variance - NOISE**2) * wider + NOISE**2
        # No size moves further than the timed one, nor against it: a jump would make anything of those that
        # are known little.
        self._logs = self._logs + np.clip(towards / variance, 0.0, 1.0) * error
        # Symmetric to the last bit, and bounded by rows and columns: of anything else, widened time and
        # again, variances become negative, and the curve runs away.
        self._covariance -= np.outer(towards, towards) / variance
        excess = np.sqrt(np.maximum(self._covariance.diagonal() / MOST_VARIANCE, 1.0))
        self._covariance /= excess[:, None] * excess
        self._table = np.empty(0, np.float64)
        return True

    def seconds(self, tokens: int) -> float:
        """t(tokens), interpolated; beyond the last size in the direction of the last two."""
        return float(self.up_to(tokens)[tokens - 1])

    def up_to(self, tokens: int) -> NDArray[np.float64]:
        """t(1), t(2), ... to at least t(tokens): float64, (m,) with m >= tokens. Not to be written to."""
        if len(self._table) < tokens:
            # The next timed pass makes it stale, so it extends no further than `tokens`.
            self._table = np.exp(self._interpolated(_log2_up_to(max(64, 1 << (tokens - 1).bit_length()))))
        return self._table

    def _log_seconds(self, tokens: int) -> float:
        if tokens > self._sizes[-1]:
            return float(self._interpolated(np.log2(np.array([tokens], np.float64)))[0])
        return float(np.interp(np.log2(tokens), self._knots, self._logs))

    def _interpolated(self, reach: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log seconds at these logarithms of numbers of tokens, ascending: float64, (m,) each."""
        known = self._ascending()
        logs = np.interp(reach, self._knots, known)
        beyond = reach > self._knots[-1]
        if len(known) > 1 and beyond.any():
            slope = (known[-1] - known[-2]) / (self._knots[-1] - self._knots[-2])
            logs[beyond] = known[-1] + slope * (reach[beyond] - self._knots[-1])
        return np.clip(logs, np.log(LEAST_SECONDS), np.log(LONGEST_SECONDS))

    def _ascending(self) -> NDArray[np.float64]:
        """The nearest curve, by weighted squares, on which more tokens never cost less: float64, (sizes,).

        A size that has not been tried for long weighs little against its neighbours. Pool adjacent violators
        (Ayer et al. 1955).
        """
        pools: list[tuple[float, float, int]] = []
        for mean, variance in zip(self._logs.tolist(), self._covariance.diagonal().tolist(), strict=True):
            weight, count = 1.0 / max(variance, 1e-6), 1
            while pools and pools[-1][0] > mean:
                other, other_weight, other_count = pools.pop()
                mean = (mean * weight + other * other_weight) / (weight + other_weight)
                weight, count = weight + other_weight, count + other_count
            pools.append((mean, weight, count))
        return np.array([mean for mean, _, count in pools for _ in range(count)])


@cache
def _log2_up_to(count: int) -> NDArray[np.float64]:
    return np.log2(np.arange(1, count + 1))
