"""The filter against itself written in numpy, with whole matrices."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting._kernels import time_curve as kernels
from retrieval_draft.drafting.time_curve import TimeCurve


class Twin:
    """A curve's arrays, updated by matrix algebra."""

    def __init__(self, curve: TimeCurve) -> None:
        self.knots, self.alike = curve._knots, curve._alike
        self.logs, self.covariance = curve._logs.copy(), curve._covariance.copy()
        self.suspected = np.zeros(len(self.knots))

    def ascending(self) -> np.ndarray:
        pools: list[tuple[float, float, int]] = []
        for mean, variance in zip(self.logs.tolist(), self.covariance.diagonal().tolist(), strict=True):
            weight, count = 1.0 / max(variance, 1e-6), 1
            while pools and pools[-1][0] > mean:
                other, other_weight, other_count = pools.pop()
                mean = (mean * weight + other * other_weight) / (weight + other_weight)
                weight, count = weight + other_weight, count + other_count
            pools.append((mean, weight, count))
        return np.array([mean for mean, _, count in pools for _ in range(count)])

    def log_at(self, positions: np.ndarray, logs: np.ndarray) -> np.ndarray:
        out = np.interp(positions, self.knots, logs)
        beyond = positions > self.knots[-1]
        slope = (logs[-1] - logs[-2]) / (self.knots[-1] - self.knots[-2])
        out[beyond] = logs[-1] + slope * (positions[beyond] - self.knots[-1])
        return out

    def observe(self, tokens: int, seconds: float) -> bool:
        place = np.log2(tokens)
        weights = np.maximum(0.0, 1.0 - np.abs(self.knots - min(place, self.knots[-1])))
        weights /= weights.sum()
        drift = kernels.DRIFT_TOGETHER**2 + kernels.DRIFT_EACH**2 * self.alike
        self.covariance += min(seconds, kernels.DRIFTED_SECONDS) * drift
        known = self.ascending() if place > self.knots[-1] else self.logs
        error = np.log(seconds) - self.log_at(np.array([place]), known)[0]
        towards = self.covariance @ weights
        variance = weights @ towards + kernels.NOISE**2
        knot = int(weights.argmax())
        before, self.suspected[knot] = self.suspected[knot], 0.0
        if error**2 > kernels.SUSPICIOUS**2 * variance:
            if error * before <= 0:
                self.suspected[knot] = error
                return False
            error = np.sign(error) * min(abs(error), abs(before))
            wider = max(error**2 / variance, 1.0)
            self.covariance *= wider
            towards = towards * wider
            variance = (variance - kernels.NOISE**2) * wider + kernels.NOISE**2
        self.logs = self.logs + np.clip(towards / variance, 0.0, 1.0) * error
        self.covariance -= np.outer(towards, towards) / variance
        excess = np.sqrt(np.maximum(self.covariance.diagonal() / kernels.MOST_VARIANCE, 1.0))
        self.covariance /= excess[:, None] * excess
        return True


@pytest.mark.parametrize("seed", range(8))
def test_a_hundred_passes_of_any_size_and_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curve = TimeCurve({1 << power: 0.02 * 1.4**power for power in range(7)})
    twin = Twin(curve)
    for _ in range(100):
        tokens = int(rng.integers(1, 200))
        seconds = float(np.exp(rng.normal(-3.5, rng.choice([0.05, 2.0]))))
        assert curve.observe(tokens, seconds) == twin.observe(tokens, seconds)
        np.testing.assert_allclose(curve._logs, twin.logs, rtol=1e-9)
        np.testing.assert_allclose(curve._covariance, twin.covariance, rtol=1e-7, atol=1e-12)
        if rng.random() < 0.3:
            continue
        expected = np.exp(twin.log_at(np.log2(np.arange(1, 129)), twin.ascending()))
        if curve._suspected.any():  # a time that is not believed leaves the table as it was
            continue
        np.testing.assert_allclose(curve.up_to(128)[:128], expected, rtol=1e-7)
