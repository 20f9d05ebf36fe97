"""Top-k, argmax and probabilities against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_draft.engine._kernels.softmax import exp_sums
from retrieval_draft.engine.logits import LogitReader, top_k


@pytest.mark.parametrize("vocabulary", [5, 97, 4096, 8192, 8193, 70_001])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reader_equals_torch(vocabulary: int, rows: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows + 2, vocabulary) * 4).to(dtype)
    found = LogitReader(8).read(logits, rows)
    probs = logits[:rows].float().softmax(-1)
    k = min(8, vocabulary)
    assert found.next_tokens.tolist() == logits[:rows].argmax(-1).tolist()
    assert found.finite.all()
    assert found.top_tokens.shape == found.top_probs.shape == (rows, k)
    tokens = torch.from_numpy(found.top_tokens.astype(np.int64))
    torch.testing.assert_close(probs.gather(-1, tokens), probs.topk(k).values)
    torch.testing.assert_close(torch.from_numpy(found.top_probs), probs.topk(k).values, rtol=2e-4, atol=1e-7)
    assert all(len(set(row)) == k for row in found.top_tokens.tolist())


@pytest.mark.parametrize("vocabulary", [50, 8200])
def test_lowest_id_wins_a_tie_as_in_torch(vocabulary: int) -> None:
    for where in ([3, 9], [0, vocabulary - 1], [vocabulary - 2, vocabulary - 1], [300 % vocabulary, 40]):
        logits = torch.zeros(1, vocabulary)
        logits[0, where] = 1.0
        assert LogitReader(2).read(logits).next_tokens.tolist() == [min(where)]
    assert LogitReader(4).read(torch.zeros(1, vocabulary)).next_tokens.tolist() == [0]


@pytest.mark.parametrize("vocabulary", [50, 8200])
@pytest.mark.parametrize("at", [0, 7, -1])
@pytest.mark.parametrize("k", [0, 4])
def test_nan_is_flagged_in_its_row_only(vocabulary: int, at: int, k: int) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, at] = float("nan")
    assert LogitReader(k).read(logits).finite.tolist() == [True, False, True]


def test_argmax_alone_reads_no_alternatives() -> None:
    found = LogitReader(0).read(torch.randn(2, 9000))
    assert found.top_tokens.shape == (2, 0)


def test_top_k_in_few_blocks() -> None:
    logits = torch.randn(2, 8192)
    logits[:, 256:290] += 100  # all of the largest in one block
    assert torch.equal(top_k(logits, 32)[2], logits.topk(32).values)


def test_exp_sums_equal_numpy() -> None:
    logits = (np.random.default_rng(0).standard_normal((3, 5000)) * 5).astype(np.float32)
    logits[1, 100] = -np.inf
    best, out = logits.max(-1), np.empty(3, np.float32)
    exp_sums(logits, best, out)
    expected = np.exp(logits - best[:, None]).sum(-1, dtype=np.float64)
    np.testing.assert_allclose(out, expected, rtol=2e-4)


def test_reading_in_place_equals_reading_packed() -> None:
    logits = torch.randn(4, 9001) * 3
    logits[2, 5] = float("-inf")
    here = LogitReader(8).read(logits)
    there = LogitReader(8).read(logits[:, None].expand(-1, 2, -1)[:, 0])  # not contiguous
    for name in ("next_tokens", "finite", "top_tokens"):
        assert (getattr(here, name) == getattr(there, name)).all()
    np.testing.assert_allclose(here.top_probs, there.top_probs, rtol=1e-4)


def test_signed_zeros_and_negative_nan_are_read_as_torch_reads_them() -> None:
    logits = torch.full((1, 9000), -1.0)
    logits[0, 300], logits[0, 8000] = -0.0, 0.0
    assert LogitReader(2).read(logits).next_tokens.tolist() == logits.argmax(-1).tolist() == [300]
    logits[0, 400] = -float("nan")
    assert not LogitReader(2).read(logits).finite[0]
