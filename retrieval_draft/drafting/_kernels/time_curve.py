"""The filter of `TimeCurve`, which would take a tenth of a millisecond a step in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["ascend", "fill", "observe"]

NOISE = 0.1
"""Standard deviation of one pass's time, in natural logarithms as all below."""

DRIFT_TOGETHER, DRIFT_EACH = 0.15, 0.04
"""Drift in one second of passes: a longer context, a warmer machine, another process beside this one."""

SUSPICIOUS = 3.0
"""Standard deviations from which a time is an outlier, unless the next of its size agrees with it."""

MOST_VARIANCE = 4.0
LEAST_SECONDS, LONGEST_SECONDS = 1e-9, 1e6
DRIFTED_SECONDS = 10.0
"""A pass that took longer counts as so long for the drift: a machine that slept."""

_LEAST_LOG, _LONGEST_LOG = np.log(LEAST_SECONDS), np.log(LONGEST_SECONDS)


@kernel
def ascend(logs: NDArray[np.float64], covariance: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """The nearest curve, by weighted squares, on which more tokens never cost less.

    A size that has not been tried for long weighs little against its neighbours. Pool adjacent violators
    (Ayer et al. 1955).

    Args:
        logs: float64, shape (sizes,). Logarithms of seconds.
        covariance: float64, shape (sizes, sizes).
        out: float64, shape (sizes,). Written.
    """
    size = len(logs)
    means, weights, counts = np.empty(size), np.empty(size), np.empty(size, np.int64)
    pools = 0
    for index in range(size):
        mean, weight, count = logs[index], 1.0 / max(covariance[index, index], 1e-6), 1
        while pools and means[pools - 1] > mean:
            pools -= 1
            other = weights[pools]
            mean = (mean * weight + means[pools] * other) / (weight + other)
            weight, count = weight + other, count + counts[pools]
        means[pools], weights[pools], counts[pools] = mean, weight, count
        pools += 1
    end = 0
    for pool in range(pools):
        out[end : end + counts[pool]] = means[pool]
        end += counts[pool]


@kernel
def _interpolated(knots: NDArray[np.float64], logs: NDArray[np.float64], position: float) -> float:
    """The curve at `position`; beyond the last knot in the direction of the last two."""
    last = len(knots) - 1
    if last == 0 or position <= knots[0]:
        return logs[0]
    right = 1
    while right < last and knots[right] <= position:
        right += 1
    share = (position - knots[right - 1]) / (knots[right] - knots[right - 1])
    return logs[right - 1] + share * (logs[right] - logs[right - 1])


@kernel
def fill(
    knots: NDArray[np.float64],
    logs: NDArray[np.float64],
    covariance: NDArray[np.float64],
    table: NDArray[np.float64],
) -> None:
    """Writes t(1), t(2), ... of the ascending curve.

    Args:
        knots: float64, shape (sizes,). Binary logarithms of the sizes, ascending.
        logs: float64, shape (sizes,). Logarithms of seconds.
        covariance: float64, shape (sizes, sizes).
        table: float64, shape (n,). Written.
    """
    ascending = np.empty(len(logs))
    ascend(logs, covariance, ascending)
    for index in range(len(table)):
        log = _interpolated(knots, ascending, np.log2(index + 1.0))
        table[index] = np.exp(min(max(log, _LEAST_LOG), _LONGEST_LOG))


@kernel
def observe(
    knots: NDArray[np.float64],
    logs: NDArray[np.float64],
    covariance: NDArray[np.float64],
    alike: NDArray[np.float64],
    suspected: NDArray[np.float64],
    tokens: int,
    seconds: float,
    table: NDArray[np.float64],
) -> bool:
    """One step of the Kalman filter, and the table of its curve.

    Args:
        knots: float64, shape (sizes,). Binary logarithms of the sizes, ascending.
        logs: float64, shape (sizes,). Logarithms of seconds. Changed.
        covariance: float64, shape (sizes, sizes). Of their errors. Changed.
        alike: float64, shape (sizes, sizes). Correlation of the sizes' own drifts.
        suspected: float64, shape (sizes,). Errors of implausible times that wait for another. Changed.
        tokens: Tokens in the pass, at least 1.
        seconds: Its duration, above 0.
        table: float64, shape (n,). t(1), t(2), ... Written.

    Returns:
        False for a time that is not believed yet.
    """
    is_believed = _observe(knots, logs, covariance, alike, suspected, tokens, seconds)
    if is_believed:
        fill(knots, logs, covariance, table)
    return is_believed


@kernel
def _observe(
    knots: NDArray[np.float64],
    logs: NDArray[np.float64],
    covariance: NDArray[np.float64],
    alike: NDArray[np.float64],
    suspected: NDArray[np.float64],
    tokens: int,
    seconds: float,
) -> bool:
    size = len(knots)
    position = np.log2(float(tokens))
    weights, towards = np.empty(size), np.empty(size)
    for index in range(size):
        weights[index] = max(0.0, 1.0 - abs(knots[index] - min(position, knots[-1])))
    weights /= weights.sum()
    covariance += min(seconds, DRIFTED_SECONDS) * (DRIFT_TOGETHER**2 + DRIFT_EACH**2 * alike)
    known = logs
    if position > knots[-1]:
        known = np.empty(size)
        ascend(logs, covariance, known)
    error = np.log(max(seconds, LEAST_SECONDS)) - _interpolated(knots, known, position)
    variance = NOISE**2
    for index in range(size):
        towards[index] = (covariance[index] * weights).sum()
        variance += towards[index] * weights[index]
    knot = weights.argmax()
    before, suspected[knot] = suspected[knot], 0.0
    if error * error > SUSPICIOUS**2 * variance:
        if error * before <= 0:
            suspected[knot] = error
            return False
        error = np.sign(error) * min(abs(error), abs(before))
        # Wide enough for the error: what is known well keeps its place more than what is not.
        wider = max(error * error / variance, 1.0)
        covariance *= wider
        towards *= wider
        variance = (variance - NOISE**2) * wider + NOISE**2
    for index in range(size):
        # No size moves further than the timed one, nor against it: a jump would make anything of those that
        # are known little.
        logs[index] += min(max(towards[index] / variance, 0.0), 1.0) * error
        # Symmetric to the last bit, and bounded by rows and columns: of anything else, widened time and
        # again, variances become negative, and the curve runs away.
        for other in range(size):
            covariance[index, other] -= towards[index] * towards[other] / variance
    excess = np.sqrt(np.maximum(np.diag(covariance) / MOST_VARIANCE, 1.0))
    for index in range(size):
        for other in range(size):
            covariance[index, other] /= excess[index] * excess[other]
    return True
