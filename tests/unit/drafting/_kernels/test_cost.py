"""The choice of n against the formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting._kernels.cost import best_nodes


def twin(
    probs: np.ndarray, curve: np.ndarray, rows: int, carried: int, overhead: float, least_rate: float
) -> int:
    expected = rows + np.concatenate(([0.0], np.cumsum(probs.astype(np.float64))))
    first = rows - 1 + max(carried, 0)
    seconds = curve[first : first + len(expected)] + overhead
    if carried >= 0:
        refused = 1.0 - np.concatenate(([1.0], probs.astype(np.float64)))
        seconds = seconds + refused * (curve[carried + np.rint(expected).astype(int)] - curve[0])
    rate = max(float((expected / seconds).max()), least_rate)
    return int(np.argmax(expected - rate * seconds))


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 60))
    probs = np.sort(rng.random(size).astype(np.float32))[::-1] ** rng.integers(1, 4)
    probs = np.ascontiguousarray(probs, np.float32)
    rows = int(rng.integers(1, 5))
    carried = int(rng.integers(-1, 5)) if rows == 1 else -1
    curve = np.cumsum(rng.random(200)) + 2.0
    given = (probs, curve, rows, carried, float(rng.random()), float(rng.choice([0.0, 0.5])))
    assert best_nodes(*given) == twin(*given)
