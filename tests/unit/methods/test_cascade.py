"""Cascade: what the base copies is reviewed by the draft model, more of it stands behind."""

from __future__ import annotations

import numpy as np
import torch

from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.methods.cascade import LENIENCES, SIZES, CascadeSession
from tests.support.drafters import prompt_ids
from tests.support.models import make

REVIEWED, BEHIND = SIZES[1][0]


def session(model: object, *prompt: int, second: object = None) -> CascadeSession:
    models = [model] if second is None else [model, second]
    text = np.array(prompt, np.int32)
    return CascadeSession([ModelDraft(each, 97).session(text) for each in models], text)


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
        assert float(row[token]) >= float(row.max()) / LENIENCES[1] * 0.99


def test_later_positions_are_the_bases_alone() -> None:
    opened = session(make("llama"), *([1, 2, 3] * 10))
    proposal = opened.propose(60)
    assert len(proposal) <= REVIEWED + BEHIND
    assert proposal.parents.tolist() == list(range(-1, len(proposal) - 1))


def test_two_models_in_a_row() -> None:
    best, cheap = make("llama"), make("llama", seed=7, num_hidden_layers=1)
    text = prompt_ids(30)[0].tolist()
    opened = session(best, *text, second=cheap)
    reviewed: list[tuple[int, int, int]] = []
    review = opened._review

    def seen(model: int, chain: list[int], guesses: list[int]) -> list[int]:
        found = review(model, chain, guesses)
        reviewed.append((model, len(chain), len(guesses)))
        return found

    opened._review = seen  # type: ignore[method-assign, assignment]
    chain = opened.propose(60).tokens.tolist()
    first, second, base = SIZES[2][0]
    assert first + second <= len(chain) <= first + second + base
    assert {model for model, *_ in reviewed} == {0, 1}
    assert max(start for model, start, _ in reviewed if model == 0) < first
    assert max(start for model, start, _ in reviewed if model == 1) >= first
    with torch.no_grad():
        for model, begin, end in ((best, 0, first), (cheap, first, first + second)):
            logits = model(torch.tensor([[*text, *chain]])).logits[0, len(text) - 1 : -1].float()
            probs = logits.softmax(-1)[begin:end]
            for token, row in zip(chain[begin:end], probs, strict=True):
                assert float(row[token]) >= float(row.max()) / LENIENCES[2] * 0.99
    assert opened.propose(7).tokens.tolist() == chain[:7]
    opened.close()
