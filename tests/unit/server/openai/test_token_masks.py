"""Allowed tokens, and texts that a reply does not have."""

from __future__ import annotations

import torch

from retrieval_draft.server.openai.token_masks import AllowedTokens, BadWords


def test_no_other_token_can_be_said() -> None:
    scores = AllowedTokens([3, 1], 4)(torch.tensor([[0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert scores.tolist() == [[-torch.inf, 2.0, -torch.inf, 4.0]]


def test_bad_words_are_masked_at_their_last_token() -> None:
    refused = BadWords(2, [[5], [6, 7], [6, 6, 4]])
    scores = torch.zeros((2, 8), dtype=torch.float32)
    out = refused(torch.tensor([[6, 6, 6, 6], [9, 6, 6, 1]], dtype=torch.int64), scores)
    assert [torch.isinf(row).nonzero().flatten().tolist() for row in out] == [[4, 5, 7], [5]]
    assert torch.isinf(refused(torch.tensor([[6, 6]], dtype=torch.int64), scores[:1])).sum() == 1
