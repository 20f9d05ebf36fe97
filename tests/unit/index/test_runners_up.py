"""The target's last rankings, without what it chose, are guesses of the next token."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.index.runners_up import (
    EARLIER,
    FADE,
    LAST,
    POSITIONS,
    WEIGHTS,
    RunnersUpSession,
    RunnersUpSource,
)
from retrieval_draft.index.source import NodeLogits


def logits(context: list[int], tokens: list[int], probs: list[float]) -> NodeLogits:
    return NodeLogits(
        np.array([context], np.int32), np.array([tokens], np.int32), np.array([probs], np.float32)
    )


def opened() -> RunnersUpSession:
    return RunnersUpSource().open(np.array([1, 2, 3, 4], np.int32))


def test_runners_up_are_guesses_and_the_chosen_token_is_none() -> None:
    session = opened()
    session.learn(logits([1, 2, 3, 4], [7, 5, 6], [0.6, 0.3, 0.1]))
    session.observe(np.array([7], np.int32))
    proposal = session.propose(8)
    assert proposal.tokens.tolist() == [5, 6]
    assert proposal.parents.tolist() == [-1, -1]
    assert proposal.probs == pytest.approx([LAST * 0.3, LAST * 0.1])
    assert proposal.match_lengths.tolist() == [0, 0]
    assert session.propose(1).tokens.tolist() == [5]
    assert len(session.propose(0)) == 0


def test_positions_add_up_and_fade() -> None:
    session = opened()
    session.learn(logits([1, 2, 3, 4], [7, 5], [0.6, 0.3]))
    session.observe(np.array([7], np.int32))
    session.propose(8)
    session.learn(logits([2, 3, 4, 7], [8, 5, 9], [0.5, 0.2, 0.1]))
    session.observe(np.array([8], np.int32))
    proposal = session.propose(8)
    assert proposal.tokens.tolist() == [5, 9]
    assert proposal.probs == pytest.approx([LAST * 0.2 + EARLIER * FADE * 0.3, LAST * 0.1])


def test_rejected_nodes_are_left_out_whether_tokens_come_before_or_after() -> None:
    for before in (True, False):
        session = opened()
        if before:
            session.observe(np.array([7], np.int32))
        session.learn(
            NodeLogits(
                np.array([[1, 2, 3, 4], [2, 3, 4, 9]], np.int32),
                np.array([[7, 5], [6, 4]], np.int32),
                np.array([[0.6, 0.3], [0.6, 0.3]], np.float32),
            )
        )
        if not before:
            session.observe(np.array([7], np.int32))
        assert session.propose(8).tokens.tolist() == [5]


def test_a_choice_without_a_ranking_says_nothing() -> None:
    session = opened()
    session.learn(logits([1, 2, 3, 4], [7], [1.0]))
    session.observe(np.array([7], np.int32))
    assert len(session.propose(8)) == 0


def test_guesses_are_those_of_a_plain_twin() -> None:
    rng = np.random.default_rng(0)
    session = opened()
    text = [1, 2, 3, 4]
    ranked: dict[int, list[tuple[int, float]]] = {}  # by the position of the token that each chose
    for _ in range(80):
        size = int(rng.integers(1, 4))
        emitted = rng.choice(30, size).tolist()
        probs = -np.sort(-rng.dirichlet(np.full(8, 0.3), size).astype(np.float32))
        tokens = np.stack([rng.permutation(30)[:8] for _ in range(size)]).astype(np.int32)
        longer = np.array([*text, *emitted], np.int32)
        contexts = np.stack([longer[at - 4 : at] for at in range(len(text), len(longer))])
        for row in range(size):
            ranked[len(text) + row] = list(zip(tokens[row].tolist(), probs[row], strict=True))
        session.learn(NodeLogits(contexts, tokens, probs))
        session.observe(longer[len(text) :])
        text += emitted
        sums: dict[int, float] = {}
        for back in range(POSITIONS):
            at = len(text) - 1 - back
            for token, prob in ranked.get(at, ()):
                if prob * WEIGHTS[back] < 1e-4:
                    break
                if token != text[at]:
                    sums[token] = sums.get(token, 0.0) + prob * WEIGHTS[back]
        best = sorted(sums, key=lambda token: -sums[token])
        for budget in (0, 3, 200):
            proposal = session.propose(budget)
            assert proposal.tokens.tolist() == best[:budget]
            assert proposal.probs == pytest.approx([sums[token] for token in best[:budget]])
            assert (proposal.parents == -1).all()
