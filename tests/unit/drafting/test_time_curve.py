from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting.time_curve import TimeCurve

SECONDS = {1: 0.030, 2: 0.036, 4: 0.048, 8: 0.072, 16: 0.120}


def test_one_outlier_changes_nothing_and_two_are_believed() -> None:
    curve = TimeCurve(SECONDS)
    assert not curve.observe(4, 0.3)
    assert curve.by_size() == pytest.approx(SECONDS)
    assert curve.observe(4, 0.3)
    assert curve.seconds(4) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_outliers_of_both_signs_or_far_apart_do_not_agree(factor: float) -> None:
    curve = TimeCurve(SECONDS)
    assert not curve.observe(4, SECONDS[4] * factor)
    assert not curve.observe(4, SECONDS[4] / factor)
    assert not curve.observe(16, SECONDS[16] * factor)
    assert curve.by_size() == pytest.approx(SECONDS)


def test_a_slower_machine_moves_the_sizes_that_were_not_tried_too() -> None:
    curve = TimeCurve(SECONDS)
    for _ in range(30):
        for size in (1, 4):
            curve.observe(size, 2 * SECONDS[size])
    assert curve.seconds(16) > 1.6 * SECONDS[16]


def test_sizes_in_between_and_beyond() -> None:
    curve = TimeCurve(SECONDS)
    assert SECONDS[4] < curve.seconds(6) < SECONDS[8]
    assert curve.seconds(32) == pytest.approx(SECONDS[16] ** 2 / SECONDS[8])
    assert curve.observe(200, curve.seconds(200)), "a time beyond the last size counts for the last"
    assert curve.extended((1, 2, 4, 8, 16, 32)).seconds(32) == pytest.approx(curve.seconds(32))
    assert curve.scaled(3.0).seconds(5) == pytest.approx(3 * curve.seconds(5))


def test_more_tokens_never_cost_less_whatever_was_timed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        curve = TimeCurve(SECONDS)
        for _ in range(100):
            curve.observe(int(rng.integers(1, 40)), float(rng.lognormal(0, 2)))
        times = curve.up_to(64)
        assert np.isfinite(times).all()
        assert (np.diff(times) >= 0).all()


def test_old_measurements_fade() -> None:
    """A hundred passes ago weighs less than now, however many they were."""
    curve = TimeCurve(SECONDS)
    for _ in range(1000):
        curve.observe(1, 0.03)
    for _ in range(50):
        curve.observe(1, 0.0375)
    assert curve.seconds(1) == pytest.approx(0.0375, rel=0.03)


@pytest.mark.parametrize("seed", range(12))
def test_times_that_jump_leave_the_curve_among_them(seed: int) -> None:
    # As beside processes that come and go: each jump widens the filter's covariance, which must stay one.
    random = np.random.default_rng(seed)
    curve = TimeCurve(SECONDS)
    level, seen = 0.0, list(SECONDS.values())
    for _ in range(200):
        tokens = int(random.choice([1, 2, 3, 5, 9, 16]))
        if random.random() < 0.1:
            level = 3.0 * random.normal()
        seen.append(0.03 * (1 + 0.1 * tokens) * float(np.exp(level + 0.3 * random.normal())))
        curve.observe(tokens, seen[-1])
        times = list(curve.by_size().values())
        assert min(seen) / 100 < times[0] <= times[-1] < 100 * max(seen)
