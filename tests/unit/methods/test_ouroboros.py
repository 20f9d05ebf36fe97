"""Ouroboros: the draft model's chain and three phrases behind it."""

from __future__ import annotations

import numpy as np
import torch

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods import ouroboros
from retrieval_draft.methods.ouroboros import DRAFTED, KEPT, OuroborosSession, PhrasePool
from tests.support.models import make


def test_docstring_example() -> None:
    pool = PhrasePool()
    pool.add([5, 1, 2, 3, 4, 6, 7])
    assert pool.newest(5) == [(1, 2, 3, 4, 6, 7)]
    assert pool.newest(1) == [], "a phrase is whole"


def test_the_newest_phrases_come_first_and_old_ones_go() -> None:
    pool = PhrasePool()
    for last in range(KEPT + 5):
        pool.add([5, 1, 2, 3, 4, 6, 100 + last])
    pool.add([5, 1, 2, 3, 4, 6, 110])
    assert [phrase[-1] for phrase in pool.newest(5)] == [110, 100 + KEPT + 4, 100 + KEPT + 3]
    assert pool.nbytes == 100 * KEPT


def test_tokens_used_longest_ago_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(ouroboros, "MAX_TOKENS", 2)
    pool = PhrasePool()
    for first in (1, 2, 3):
        pool.add([first, *range(10, 16)])
    assert pool.newest(1) == []
    assert pool.newest(3)


def test_the_greedy_chain_is_extended_by_phrases_of_earlier_requests() -> None:
    model, pool = make("llama"), PhrasePool()
    limits = ExpansionLimits(top_k=1, depth=DRAFTED, entropy_stop=None)
    text = np.arange(1, 15, dtype=np.int32)
    stock = model.generate(torch.tensor([text.tolist()]), max_new_tokens=DRAFTED, do_sample=False)
    chain = stock[0, len(text) :].tolist()
    pool.add([chain[-1], 1, 2, 3, 4, 5, 6])
    proposal = OuroborosSession(ModelDraft(model, 97).session(text, limits, 1), pool, text).propose(60)
    assert proposal.tokens[:DRAFTED].tolist() == chain
    assert proposal.parents[:DRAFTED].tolist() == list(range(-1, DRAFTED - 1))
    last = proposal.tokens[DRAFTED:].tolist()
    assert last[:6] == [1, 2, 3, 4, 5, 6]
    assert proposal.parents[DRAFTED] == DRAFTED - 1


def test_phrases_are_put_right_by_what_was_predicted_at_rejected_nodes() -> None:
    pool = PhrasePool()
    limits = ExpansionLimits(top_k=1, depth=DRAFTED, entropy_stop=None)
    text = np.array([7, 8, 9], np.int32)
    opened = OuroborosSession(ModelDraft(make("llama"), 97).session(text, limits, 1), pool, text)
    # Below 9 the phrase 1 2 3 4 5 6, at which other tokens are predicted, and another branch, 20.
    path = [7, 8, 9, 1, 2, 3, 4, 5, 6]
    contexts = [[-1, 7, 8, 9], *(path[end - 4 : end] for end in range(4, 10)), [7, 8, 9, 20]]
    logits = NodeLogits(
        np.array(contexts, np.int32),
        np.array([[11], [12], [13], [14], [15], [16], [17], [30]], np.int32),
        np.ones((8, 1), np.float32),
    )
    opened.learn(logits)
    assert pool.newest(9) == [], "predictions at the prompt are left out"
    opened.propose(60)
    before = pool.newest(9)
    opened.learn(logits)
    assert pool.newest(9)[0] == (11, 12, 13, 14, 15, 16)
    assert pool.newest(1) == [(12, 13, 14, 15, 16, 17)]
    assert pool.newest(9)[1:] == before[:2]
    assert pool.newest(20) == []
    opened.close()
