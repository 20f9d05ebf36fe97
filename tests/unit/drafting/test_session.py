"""The budget follows what drafts bring: none where they do not pay, some again once they do."""

from __future__ import annotations

import numpy as np

from retrieval_draft.drafting.budget import Budget
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.cost import SIZES, CostModel
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.drafting.grammar.compiler import compiler_of
from retrieval_draft.drafting.grammar.grammar import Grammar
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.session import DraftSession, _likely_outcomes
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from tests.support.grammars import json_tokenizer
from tests.support.sources import sessions_of


class Guesser:
    """Always sure of a chain of token 1."""

    def propose(self, budget: int) -> Proposal:
        size = min(budget, 8)
        return Proposal(
            np.ones(size, np.int32),
            np.arange(-1, size - 1, dtype=np.int32),
            np.full(size, 0.9, np.float32),
            np.full(size, 5, np.int32),
            "automaton",
            "request",
        )

    def observe(self, tokens: TokenArray) -> None: ...
    def learn(self, logits: NodeLogits) -> None: ...
    def close(self) -> None: ...


def no_predictions(nodes: int) -> Predictions:
    return Predictions(
        np.zeros(nodes, np.int32),
        np.ones(nodes, np.bool_),
        np.zeros((nodes, 1), np.int32),
        np.ones((nodes, 1), np.float32),
    )


def test_drafts_that_do_not_pay_are_not_verified_and_are_tried_again() -> None:
    cost = CostModel()
    cost.load({size: 1.0 + 0.3 * (size - 1) for size in SIZES})  # a pass where every token costs
    drafting = DraftSession(sessions_of(Guesser()), fuse, Calibration().open(), 60, 100, DraftStats())
    budget = Budget(cost)

    def steps(count: int, token: int) -> list[int]:
        verified = []
        for _ in range(count):
            plan = drafting.propose(1, 50, 100)
            plan = plan.cut(budget.share([plan.tree], [50])[0])
            size = plan.tree.num_draft_tokens
            verified.append(size)
            emitted = np.full(1 if token != 1 else size + 1, token, np.int32)
            drafting.observe(emitted)
            top = no_predictions(size + 1)
            contexts = plan.tree.contexts(np.ones(3, np.int32))
            drafting.learn(plan, emitted, NodeLogits(contexts, top.top_tokens, top.top_probs))
        return verified

    assert steps(1, 1)[0] > 0
    wrong = steps(120, 2)
    assert wrong[-60:] == [0] * 60, "always wrong: plain steps"
    assert sum(wrong) < 400, "and soon"
    right = steps(120, 1)
    assert right[-1] >= 8, "a plain step teaches too: it is believed again"


class Learner(Guesser):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.learned: list[NodeLogits] = []

    def learn(self, logits: NodeLogits) -> None:
        self.learned.append(logits)


def test_excluded_ids_are_neither_drafted_nor_learned() -> None:
    learner = Learner()
    every = DraftSession(sessions_of(learner), fuse, Calibration().open(), 60, 100, DraftStats())
    drafted = set(every.propose(1, 50, 100).tree.tokens[1:].tolist())
    excluded = drafted.pop()
    session = DraftSession(
        sessions_of(learner), fuse, Calibration().open(), 60, 100, DraftStats(), [excluded]
    )
    plan = session.propose(excluded, 50, 100)
    assert plan.tree.tokens[0] == excluded, "the root is in the text already"
    assert excluded not in plan.tree.tokens[1:]
    contexts = np.array([[70, 71, 72, 73], [70, 71, 72, excluded], [70, 71, 72, 74]], np.int32)
    top = np.array([[75], [75], [excluded]], np.int32)
    session.learn(plan, np.array([75], np.int32), NodeLogits(contexts, top, np.ones((3, 1), np.float32)))
    assert learner.learned[-1].contexts.tolist() == [[70, 71, 72, 73]]


class Recorder(Guesser):
    """Keeps the text that it is given."""

    def __init__(self) -> None:
        self.text: list[int] = []

    def observe(self, tokens: TokenArray) -> None:
        self.text += tokens.tolist()


def test_what_a_grammar_forces_is_drafted_first_and_seen_by_the_sources_once() -> None:
    tokenizer = json_tokenizer()
    compiler = compiler_of(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    text = compiler.compile(Grammar.regex("ZQXZ[ab]ZZ")).open()
    recorder, stats = Recorder(), DraftStats()
    session = DraftSession(
        sessions_of(recorder), fuse, Calibration().open(), 60, len(tokenizer), stats, (), text
    )
    forced = tokenizer.encode("ZQXZ")
    plan = session.propose(7, 50, 100)
    assert plan.tree.tokens[: len(forced) + 1].tolist() == [7, *forced]
    assert plan.ahead == len(forced)
    assert recorder.text == forced
    session.observe(np.array(forced[:2], np.int32))  # the budget cut the rest off
    text.follow(np.array(forced[:2], np.int32))
    plan = session.propose(forced[1], 52, 100)
    assert plan.tree.tokens[1:3].tolist() == forced[2:]
    assert recorder.text == forced
    ending = [*forced[2:], *tokenizer.encode("a")]
    session.count(plan, range(3))
    session.observe(np.array(ending, np.int32))
    text.follow(np.array([*forced, *tokenizer.encode("a")], np.int32))
    assert recorder.text == [*forced, *tokenizer.encode("a")]
    plan = session.propose(ending[-1], 55, 1)
    assert plan.tree.tokens.tolist() == [ending[-1], tokenizer.encode("Z")[0]]
    session.close()
    assert stats.accepted_by_source["grammar"] == 2


def test_a_token_that_was_not_forced_after_all_is_seen_too() -> None:
    recorder = Recorder()
    session = DraftSession(sessions_of(recorder), fuse, Calibration().open(), 60, 100, DraftStats())
    session._seen = [4, 5]
    session.observe(np.array([4, 6, 7], np.int32))
    assert recorder.text == [4, 6, 7]
    session.observe(np.array([8], np.int32))
    assert recorder.text == [4, 6, 7, 8]


def test_likely_outcomes_are_the_paths_that_most_often_end_there() -> None:
    tree = DraftTree(
        np.array([8, 9, 4, 3], np.int32),
        np.array([-1, 0, 1, 0], np.int32),
        np.array([0, 1, 2, 1], np.int32),
        np.array([1, 0.8, 0.75, 0.05], np.float32),
        np.array([1, 0.8, 0.6, 0.05], np.float32),
        np.zeros(4, np.int64),
    )
    assert [each.tolist() for each in _likely_outcomes(tree, 0)] == [[9, 4], [9], []]
    assert [each.tolist() for each in _likely_outcomes(tree, 1)] == [[4], [], []]
    assert [each.tolist() for each in _likely_outcomes(DraftTree.root(8), 0)] == [[]]
