"""Cascade: what the base copies is reviewed by the draft model, more of it stands behind."""

from __future__ import annotations

import numpy as np
import torch

from retrieval_draft.engine.draft_models.expansion import Expansion, ExpansionLimits
from retrieval_draft.engine.target import Target
from retrieval_draft.methods.cascade import BEHIND, LENIENCE, REVIEWED, CascadeSession
from tests.support.drafters import prompt_ids
from tests.support.models import make


def session(model: object, *prompt: int) -> CascadeSession:
    return CascadeSession(Expansion(Target(model), ExpansionLimits(top_k=1)), np.array(prompt, np.int32))  # type: ignore[arg-type]


def test_the_base_copies_behind_the_newest_longest_occurrence() -> None:
    opened = session(make("llama"), 7, 8, 1, 5, 8, 2, 7, 8)
    opened._index()
    assert opened.base([], 10) == [1, 5, 8, 2, 7, 8]
    assert opened.base([5], 2) == [8, 2], "the guesses so far are part of the text's end"
    assert opened.base([90], 5) == []


def test_what_the_model_finds_unlikely_is_replaced_by_its_own() -> None:
    model = make("llama")
    text = prompt_ids(30)[0].tolist()
    opened = session(model, *text)
    chain = opened.propose(REVIEWED).tokens.tolist()
    assert len(chain) == REVIEWED
    with torch.no_grad():
        logits = model(torch.tensor([[*text, *chain]])).logits[0, len(text) - 1 : -1].float()
    probs = logits.softmax(-1)
    for token, row in zip(chain, probs, strict=True):
        assert float(row[token]) >= float(row.max()) / LENIENCE * 0.99


def test_later_positions_are_the_bases_alone() -> None:
    opened = session(make("llama"), *([1, 2, 3] * 10))
    proposal = opened.propose(60)
    assert len(proposal) <= REVIEWED + BEHIND
    assert proposal.parents.tolist() == list(range(-1, len(proposal) - 1))
