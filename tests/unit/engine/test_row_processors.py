"""Processors of a batch, taken apart for its rows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from retrieval_draft.engine.row_processors import processors_of_row


class Counting(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


def test_a_row_alone_keeps_its_processors() -> None:
    processors = LogitsProcessorList([Counting()])
    assert processors_of_row(processors, 0, 1) is processors


def test_rows_do_not_share_what_processors_remember() -> None:
    processors = LogitsProcessorList([Counting()])
    rows = [processors_of_row(processors, row, 3) for row in range(3)]
    ids, scores = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 4)
    for turn, row in enumerate(rows):
        for _ in range(turn):
            row(ids, scores)
    assert [row[0].calls for row in rows] == [0, 1, 2]
    assert processors[0].calls == 0


def test_a_prefix_constraint_is_asked_with_the_row_of_the_batch() -> None:
    processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda row, text: [row], 1)])
    ids, scores = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 4)
    for row in range(3):
        assert int(processors_of_row(processors, row, 3)(ids, scores).argmax()) == row


def test_padding_that_a_repetition_penalty_leaves_out_is_the_rows_own() -> None:
    try:
        penalty = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([0, 1, 2]))
    except ValueError:
        pytest.skip("this transformers takes one length for all rows")
    ids, scores = torch.tensor([[3, 2, 1]]), torch.ones(1, 4)
    found = [
        processors_of_row(LogitsProcessorList([penalty]), row, 3)(ids, scores.clone()) for row in range(3)
    ]
    assert [row[0].tolist() for row in found] == [[1, 0.5, 0.5, 0.5], [1, 0.5, 0.5, 1], [1, 0.5, 1, 1]]
