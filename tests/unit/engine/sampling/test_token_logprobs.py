"""Log probabilities of a token and its alternatives."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft.engine.sampling.token_logprobs import token_logprobs


def test_logprobs_of_a_token() -> None:
    found = token_logprobs(torch.tensor([0.5, 0.25, 0.25]).log(), 1, 1)
    assert found.logprob == pytest.approx(-1.3863, abs=1e-4)
    assert found.top == [0]
    assert found.top_logprobs == pytest.approx([-0.6931], abs=1e-4)
