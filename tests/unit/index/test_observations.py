"""Predictions kept for other servers: only after contexts of the request's own text."""

from __future__ import annotations

import numpy as np

from retrieval_draft.index.observations import Observations
from retrieval_draft.index.source import NodeLogits
from tests.support.tokens import ids


def logits(*contexts: tuple[int, ...], k: int = 2) -> NodeLogits:
    padded = [[-1] * (4 - len(context)) + list(context) for context in contexts]
    tokens = np.arange(10, 10 + k, dtype=np.int32)[None].repeat(len(contexts), 0)
    return NodeLogits(
        np.array(padded, np.int32), tokens + ids(*range(len(contexts)))[:, None] * 10, tokens * 0 + 0.25
    )


def told(made: Observations, with_prompt: bool) -> list[tuple[list[int], int]]:
    return [
        (context, int(tokens[0]))
        for part in made.shareable(with_prompt)
        for context, tokens in zip(part.contexts.tolist(), part.top_tokens, strict=True)
    ]


def test_contexts_of_rejected_drafts_are_left_out() -> None:
    made = Observations(ids(1, 2))
    made.observe(ids(3))
    made.observe(ids(4, 5))
    made.learn(logits((1, 2, 3), (2, 3, 7), (1, 2, 3, 4), (2, 3, 4, 9), (2, 3, 4, 5)))
    assert told(made, True) == [([-1, 1, 2, 3], 10), ([1, 2, 3, 4], 30), ([2, 3, 4, 5], 50)]
    assert told(made, False) == [([-1, -1, -1, 3], 10), ([-1, -1, 3, 4], 30), ([-1, 3, 4, 5], 50)]


def test_the_end_of_the_prompt_is_told_with_the_prompt_only() -> None:
    made = Observations(ids(1, 2, 3, 4, 5))
    made.learn(logits((1, 2, 3, 4), (2, 3, 4, 5)))
    assert told(made, True) == [([2, 3, 4, 5], 20)]
    assert told(made, False) == [([-1, -1, -1, -1], 20)]


def test_what_comes_a_step_later_is_found_and_nothing_twice() -> None:
    made = Observations(ids(1))
    made.observe(ids(2))
    made.observe(ids(3, 4))
    made.learn(logits((1,), (1, 2)))
    made.observe(ids(5))
    made.learn(logits((1, 2), (1, 2, 3), (1, 2, 3, 4)))
    assert [context for context, _ in told(made, True)] == [
        [-1, -1, -1, 1],
        [-1, -1, 1, 2],
        [-1, 1, 2, 3],
        [1, 2, 3, 4],
    ]


def test_predictions_without_alternatives_are_left_to_the_text() -> None:
    made = Observations(ids(1))
    made.learn(logits((1,), k=1))
    assert made.shareable(True) == []


def test_a_long_request_is_bounded(monkeypatch) -> None:
    from retrieval_draft.index import observations

    monkeypatch.setattr(observations, "MOST", 10)
    made = Observations(ids(1))
    for token in range(5000):
        made.observe(ids(token))
        made.learn(logits(tuple([1, *range(token + 1)][-4:])))
    assert sum(len(part.contexts) for part in made.shareable(True)) == 10
    assert len(made._text) <= 2 * observations._RECENT + 1


def test_it_belongs_to_exactly_its_text() -> None:
    made = Observations(ids(1, 2))
    made.observe(ids(3))
    made.observe(ids(4, 5))
    assert made.belong_to(ids(1, 2), ids(3, 4, 5))
    assert not made.belong_to(ids(1, 9), ids(3, 4, 5))
    assert not made.belong_to(ids(1, 2), ids(3, 4, 6))
    assert not made.belong_to(ids(1), ids(2, 3, 4, 5))
