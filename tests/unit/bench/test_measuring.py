from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.bench.measuring import percentiles, ratio_summary, rotated


def test_each_is_first_in_its_turn() -> None:
    assert [rotated("abc", number) for number in range(4)] == [["a", "b", "c"], ["b", "c", "a"],
                                                               ["c", "a", "b"], ["a", "b", "c"]]  # fmt: skip


def test_percentiles_have_names() -> None:
    values = np.arange(101.0)
    assert percentiles(values) == {"p50": 50.0, "p99": 99.0}
    assert percentiles(values, 0, 99.9, 100, mean=True) == {
        "least": 0.0, "p99.9": pytest.approx(99.9), "max": 100.0, "mean": 50.0,
    }  # fmt: skip


def test_ratios_have_median_and_tenths() -> None:
    assert ratio_summary([1.0, 2.0, 3.0]) == {
        "median": 2.0,
        "p10": pytest.approx(1.2),
        "p90": pytest.approx(2.8),
    }
    assert ratio_summary([]) is None
