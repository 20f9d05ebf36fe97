"""Penalties and allowed tokens."""

from __future__ import annotations

import torch

from retrieval_draft.server.openai.penalties import AllowedTokens, CountPenalty


def test_penalties_count_the_reply_only() -> None:
    penalty = CountPenalty(2, presence=1.0, frequency=0.5)
    ids = torch.tensor([[3, 3, 1, 1, 2]])
    assert penalty(ids, torch.zeros(1, 4)).tolist() == [[0.0, -2.0, -1.5, 0.0]]
    assert penalty(ids[:, :2], torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_no_other_token_can_be_said() -> None:
    scores = AllowedTokens([3, 1], 4)(torch.tensor([[0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert scores.tolist() == [[-torch.inf, 2.0, -torch.inf, 4.0]]
