"""Texts reach every method with a place for them; without one for references, methods say so."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.bench.compare import lookup_methods
from retrieval_draft.config import METHODS
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.methods.method import MethodContext
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
    heads = {name for name in METHODS if get_method(name).needs_head}
    assert set(METHODS) - set(READS) - heads == {"none", "stand", "token_recycling", "opt_tree", "self"}


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


@pytest.mark.parametrize("method", ["none", "stand", "token_recycling", "opt_tree"])
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


TEXT = np.random.default_rng(5).permutation(90).astype(np.int32)
PLACES = ("references", "history", "shared", "corpora")
READ = {
    **dict.fromkeys(("prompt_lookup", "anpd", "logit_spec"), PLACES[:1]),  # by their papers the prompt's own
    "racer": PLACES[:2],  # a trie of 10,000 nodes
}
"""Methods with fewer places for text than all."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", [name for name in lookup_methods() if name in READS])
def test_a_text_is_drafted_from_where_there_is_a_place_for_it(method: str, place: str) -> None:
    given: dict[str, Any] = {}
    if place in ("shared", "corpora"):
        stored = SimpleNamespace(segments=(Segment.build([TEXT], 100),), nbytes=0, flush=lambda: None)
        given[place] = stored if place == "shared" else (stored,)
    config = DraftConfig(method=method, sources=("automaton", "history", "shared", "corpus"))
    sources = get_method(method).sources(MethodContext(config, DraftStores(100, **given)))
    try:
        if place == "history":
            for source in sources:
                session = source.open(TEXT[:10])
                session.observe(TEXT[10:])
                session.close()
                source.flush()
        references = [TEXT] if place == "references" else []
        sessions = [source.open(TEXT[20:32], references) for source in sources]
        firsts = {token for each in sessions for token in each.propose(60).tokens[:1].tolist()}
    finally:
        for source in sources:
            source.close()
    assert (int(TEXT[32]) in firsts) == (place in READ.get(method, PLACES))
