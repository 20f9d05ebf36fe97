"""Reference texts reach every method that reads text; the others say that they have no use for them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.config import METHODS
from retrieval_draft.methods.registry import get_method
from tests.support.drafters import prompt_ids
from tests.support.models import make

PROMPT = prompt_ids()
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
READS = [name for name in METHODS if get_method(name).reads_references(DraftConfig(method=name))]


def drafter_of(method: str, model: Any) -> RetrievalDrafter:
    draft = None
    if get_method(method).needs_model:
        # Ouroboros puts phrases behind what a model says, which must be right for them to count.
        draft = make("llama") if method == "ouroboros" else make("llama", seed=7, num_hidden_layers=1)
    return RetrievalDrafter.for_model(model, config=DraftConfig(method=method), draft_model=draft)


def test_most_methods_read_text() -> None:
    assert set(METHODS) - set(READS) == {"none", "stand", "token_recycling", "opt_tree"}


@pytest.mark.parametrize("method", READS)
@pytest.mark.parametrize("name", ["prediction", "documents"])
def test_a_prediction_is_drafted_from(method: str, name: str) -> None:
    model = make("llama")
    stock = model.generate(PROMPT, **OPTIONS)
    reply = stock[0, PROMPT.shape[1] :].tolist()
    steps = []
    for given in ({}, {name: [reply]}):
        drafter = drafter_of(method, model)
        assert torch.equal(drafter.generate(PROMPT, **OPTIONS, **given), stock)
        assert drafter.stats.source_failures == 0
        steps.append(drafter.stats.steps)
    assert steps[1] < steps[0]


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(READS)))
def test_a_method_without_use_for_them_says_so_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    drafter = drafter_of(method, model)
    with caplog.at_level(logging.WARNING, "retrieval_draft"):
        drafter.generate(PROMPT, **OPTIONS)
        assert not caplog.records
        for _ in range(2):
            drafter.generate(PROMPT, **OPTIONS, prediction=[5, 6, 7])
        drafter.continuous.prepare(PROMPT, **OPTIONS, documents=[[5, 6, 7]])
    (record,) = caplog.records
    assert method in record.getMessage()


@pytest.mark.parametrize("method", READS)
def test_other_requests_do_not_draft_from_them(method: str) -> None:
    model = make("llama")
    reply = model.generate(PROMPT, **OPTIONS)[0, PROMPT.shape[1] :].tolist()
    other, fresh = drafter_of(method, model), drafter_of(method, model)
    elsewhere = prompt_ids(seed=9)
    other.generate(elsewhere, **OPTIONS, documents=[reply])
    fresh.generate(elsewhere, **OPTIONS)
    for drafter in (other, fresh):
        drafter.flush()
        drafter.generate(PROMPT, **OPTIONS)
    assert other.last_stats is not None
    assert fresh.last_stats is not None
    assert other.last_stats.accepted <= fresh.last_stats.accepted + 8
