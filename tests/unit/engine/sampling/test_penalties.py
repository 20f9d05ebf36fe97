"""Penalties as processors, and as what a captured pass takes for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from retrieval_draft.engine.sampling.penalties import CountPenalty, Penalties, penalties_of

REPETITION = RepetitionPenaltyLogitsProcessor(1.3)


def test_penalties_count_the_reply_only() -> None:
    penalty = CountPenalty(2, presence=1.0, frequency=0.5)
    ids = torch.tensor([[3, 3, 1, 1, 2]])
    assert penalty(ids, torch.zeros(1, 4)).tolist() == [[0.0, -2.0, -1.5, 0.0]]
    assert penalty(ids[:, :2], torch.zeros(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("processors", "penalties"),
    [
        ([], Penalties()),
        ([REPETITION], Penalties(1.3)),
        ([RepetitionPenaltyLogitsProcessor(1.3, 7)], Penalties(1.3, 7)),
        ([RepetitionPenaltyLogitsProcessor(1.3, torch.tensor([7]))], Penalties(1.3, 7)),
        ([RepetitionPenaltyLogitsProcessor(1.3, torch.tensor([7, 8]))], None),
        ([REPETITION, CountPenalty(4, 0.5, 0.2)], Penalties(1.3, 0, 0.5, 0.2, 4)),
        ([CountPenalty(4, 0.5, 0.2), REPETITION], None),
        ([REPETITION, NoRepeatNGramLogitsProcessor(2)], None),
    ],
)
def test_lists_that_are_penalties(processors: list[Any], penalties: Penalties | None) -> None:
    assert penalties_of(processors) == penalties
