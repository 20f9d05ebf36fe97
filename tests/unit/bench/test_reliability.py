from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.bench.reliability import Reliability, plot_reliability
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.errors import InvalidInputError


def tree(*probs: float) -> DraftTree:
    """Children of one root."""
    size = len(probs) + 1
    given = np.array([1.0, *probs], np.float32)
    return DraftTree(
        np.arange(size, dtype=np.int32),
        np.array([-1] + [0] * len(probs), np.int32),
        np.minimum(np.arange(size), 1).astype(np.int32),
        given,
        given,
        np.ones(size, np.int64),
    )


def test_predictions_that_come_true_have_no_error() -> None:
    found = Reliability()
    for turn in range(100):
        found.observe(tree(0.75, 0.2), np.array([-1, turn % 4 > 0, turn % 5 == 0], np.int8))
    summary = found.summary()
    assert summary["error"] < 1e-6
    assert summary["path_error"] < 1e-6
    assert [row[2] for row in summary["bins"]] == [100, 100]


def test_the_error_is_the_mean_distance() -> None:
    found = Reliability()
    for _ in range(10):
        found.observe(tree(0.9, 0.3), np.array([-1, 0, 0], np.int8))
    summary = found.summary()
    np.testing.assert_allclose(summary["error"], (0.9 + 0.3) / 2, rtol=1e-6)
    np.testing.assert_allclose(summary["log_loss"], -np.log([0.1, 0.7]).mean(), rtol=1e-5)


def test_nodes_below_rejected_ones_are_not_observed_but_their_paths_failed() -> None:
    found = Reliability()
    found.observe(tree(0.5, 0.5), np.array([-1, 0, -1], np.int8))
    summary = found.summary()
    assert sum(row[2] for row in summary["bins"]) == 1
    np.testing.assert_allclose(summary["path_error"], 0.5)


def test_the_plot(tmp_path: Path) -> None:
    found = Reliability()
    found.observe(tree(0.9, 0.3), np.array([-1, 1, 0], np.int8))
    plot_reliability(found.summary(), tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInputError, match=r"Name a \.png"):
        plot_reliability(found.summary(), tmp_path / "r.nothing")
