from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.index._kernels.node_logits import MAX_PROB, are_probs


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf, -0.1, 1.02])
def test_rows_with_other_numbers_are_found(bad: float | None) -> None:
    values = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    if bad is not None:
        values[[1, 3], [0, 2]] = bad
    valid = np.zeros(5, np.bool_)
    expected = ((values >= 0) & (values <= MAX_PROB)).all(-1)
    assert are_probs(values, valid) == expected.all()
    assert valid.tolist() == expected.tolist()


def test_no_alternatives_are_valid() -> None:
    assert are_probs(np.empty((2, 0), np.float32), np.zeros(2, np.bool_))
