"""Processors of a batch, taken apart for its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.sampling.row_processors import criteria_of_row, processors_of_row
from retrieval_draft.errors import UnsupportedGenerationError
from tests.support.drafters import prompt_ids
from tests.support.models import make


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


def _wave(scores: torch.Tensor, step: int) -> torch.Tensor:
    return scores + 4.0 * (torch.arange(scores.shape[1]) % 7 == step % 7)


class InPlace(LogitsProcessor):
    """Grows a list, a dictionary in it and a tensor."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = [{}]
        self.count = torch.zeros(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append({})
        self.calls[0][str(len(self.calls))] = 1
        self.count += 1
        return _wave(scores, len(self.calls) + len(self.calls[0]) + 2 * int(self.count))


class StopsAfter(StoppingCriteria):
    """Ends a text after as many calls as its prompt begins with."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(1)
        return torch.full((len(input_ids),), len(self.seen) > int(input_ids[0, 0]) % 9 + 2)


BATCH = torch.cat([prompt_ids(), prompt_ids(seed=2), prompt_ids(seed=3)])
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("nodes", [0, 8])
def test_what_grows_in_place_stays_with_its_row(nodes: int) -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=nodes))

    def given() -> dict[str, Any]:
        return {"logits_processor": [InPlace()], "stopping_criteria": [StopsAfter()]}

    together = drafter.generate(BATCH, **GREEDY, **given())
    for row in range(3):
        alone = drafter.generate(BATCH[row : row + 1], **GREEDY, **given())
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert not together[row, alone.shape[1] :].any()
    assert torch.equal(
        drafter.generate(BATCH, **GREEDY, logits_processor=[InPlace()]),
        model.generate(BATCH, **GREEDY, logits_processor=[InPlace()]),
    )
    seeded = {"max_new_tokens": 20, "do_sample": True, "seed": 3, "logits_processor": [InPlace()]}
    samples = drafter.generate(BATCH[:1], **seeded, num_return_sequences=3)
    for sample in range(3):
        seeded["logits_processor"] = [InPlace()]
        assert torch.equal(samples[sample], drafter.generate(BATCH[:1], **seeded, sample=sample)[0])


@pytest.mark.parametrize(
    "made",
    [
        lambda: EncoderNoRepeatNGramLogitsProcessor(2, BATCH),
        lambda: EncoderRepetitionPenaltyLogitsProcessor(3.0, BATCH),
    ],
)
def test_what_knows_the_prompts_of_the_batch_is_cut_to_one(made: Callable[[], LogitsProcessor]) -> None:
    scores = torch.linspace(-3, 3, 97).repeat(6, 1)
    whole = made()(BATCH, scores[:3].clone())
    processors = LogitsProcessorList([made()])
    for row in range(6):  # two samples of each prompt
        prompt = row // 2
        found = processors_of_row(processors, row, 6)(BATCH[prompt : prompt + 1], scores[:1].clone())
        assert torch.equal(found[0], whole[prompt])


def test_encoder_options_of_a_batch_mean_what_they_mean_to_model_generate() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    prompts = model.generate(BATCH, **GREEDY)[:, -20:]
    for option in ({"encoder_no_repeat_ngram_size": 2}, {"encoder_repetition_penalty": 3.0}):
        expected = model.generate(prompts, **GREEDY, **option)
        assert torch.equal(drafter.generate(prompts, **GREEDY, **option), expected)
        assert torch.equal(model.generate(prompts, **GREEDY, **option, custom_generate=drafter), expected)


class Locked(Counting):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class LockedCriterion(StopsAfter):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_copied_is_refused_by_name_for_several_rows_alone() -> None:
    drafter = RetrievalDrafter.for_model(make("llama"))
    for named in ({"logits_processor": [Locked()]}, {"stopping_criteria": [LockedCriterion()]}):
        drafter.generate(BATCH[:1], **GREEDY, **named)
        with pytest.raises(UnsupportedGenerationError, match=r"Locked.* cannot be copied"):
            drafter.generate(BATCH, **GREEDY, **named)


def test_models_that_a_processor_asks_are_not_copied() -> None:
    processor = Counting()
    processor.model = make("llama")  # type: ignore[attr-defined]
    (mine,) = processors_of_row(LogitsProcessorList([processor]), 1, 2)
    assert mine is not processor
    assert mine.model is processor.model  # type: ignore[attr-defined]


def test_one_criterion_of_one_row_is_the_callers() -> None:
    criteria = StoppingCriteriaList([StopsAfter()])
    assert criteria_of_row(criteria, 1) is criteria
    assert criteria_of_row(criteria, 2)[0] is not criteria[0]


class ForThreeRows(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.zeros(3, 1)


@pytest.mark.parametrize("sampling", [False, True])
def test_scores_of_other_rows_are_refused(sampling: bool) -> None:
    drafter = RetrievalDrafter.for_model(make("llama"))
    with pytest.raises(UnsupportedGenerationError, match=r"scores of shape \(3, 97\)"):
        drafter.generate(BATCH, max_new_tokens=4, do_sample=sampling, logits_processor=[ForThreeRows()])
