"""Tests of the hierarchy of sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafting.hierarchy import SourceHierarchy, SourceSessions
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.phrases import PhraseTable
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from tests.support.sources import OpenedAs, proposal, sessions_of


class Fixed:
    """A session that always proposes one chain."""

    def __init__(self, probs: list[float]) -> None:
        self.probs = probs
        self.asked: list[int] = []

    def propose(self, budget: int) -> Proposal:
        self.asked.append(budget)
        size = min(budget, len(self.probs))
        tokens = np.arange(size, dtype=np.int32)
        return Proposal(
            tokens, tokens - 1, np.array(self.probs[:size], np.float32), tokens, "fixed", "request"
        )

    def observe(self, tokens) -> None: ...

    def learn(self, logits) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("probs", "second"),
    [([0.99] * 4, 0), ([0.8] * 4, 4), ([0.99] * 3, 4), ([], 4)],
    ids=["certain", "unlikely together", "room left", "nothing"],
)
def test_far_sources_are_asked_unless_a_near_one_fills_the_budget(probs: list[float], second: int) -> None:
    near, far = Fixed(probs), Fixed([0.5])
    proposals = sessions_of(near, far).propose(4)
    assert len(proposals) == 2  # in their places, for calibration
    assert (near.asked, far.asked) == ([4], [second])


def test_each_source_learns_once_early_or_late() -> None:
    class Learns(Fixed):
        def __init__(self, early: bool) -> None:
            super().__init__([])
            self.learns_early = early
            self.learned: list[NodeLogits] = []

        def learn(self, logits: NodeLogits) -> None:
            self.learned.append(logits)

    logits = NodeLogits(np.zeros((1, 4), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))
    early, late = Learns(True), Learns(False)
    sessions = sessions_of(early, late)
    assert sessions.learns_early
    assert not sessions_of(late, Fixed([])).learns_early
    sessions.learn(logits, early=True)
    assert (early.learned, late.learned) == ([logits], [])
    sessions.learn(logits, early=False)
    assert (early.learned, late.learned) == ([logits], [logits])
    sessions.learn(logits)
    assert (len(early.learned), len(late.learned)) == (2, 2)


def test_no_budget_asks_nobody() -> None:
    near = Fixed([0.5])
    assert sessions_of(near).propose(0) == []
    assert near.asked == []


@pytest.fixture
def stores(tmp_path) -> DraftStores:
    index = IndexFolder.create(tmp_path / "index", "f", 50)
    index.publish([index.write(Segment.build([np.array([7, 8, 9, 4], np.int32)], 50))])
    phrases = PhraseTable([np.array([1, 2, 3, 4, 5], np.int32)])
    return DraftStores(50, "f", (Corpus.open(index.path),), phrases)


def test_every_source_answers_to_its_name(stores) -> None:
    sources = make_sources(DraftConfig(), stores)
    assert [source.name for source in sources] == [name for name in SOURCES if name != "shared"]
    hierarchy = SourceHierarchy(sources)
    drafts = hierarchy.open(np.array([3, 7, 8], np.int32), ())
    by_name = {each.source: each for each in drafts.propose(8)}
    assert by_name["corpus"].tokens.tolist() == [9, 4]
    assert {each.level for each in by_name.values()} == {"request", "history", "corpus"}
    drafts.observe(np.array([9], np.int32))
    drafts.close()
    hierarchy.flush()
    again = hierarchy.open(np.array([7, 8], np.int32), ())
    assert {each.source: each for each in again.propose(8)}["history"].tokens.tolist() == [9]
    assert hierarchy.nbytes > 0
    hierarchy.close()


def test_what_there_is_nothing_for_is_left_out() -> None:
    names = [source.name for source in make_sources(DraftConfig(), DraftStores(50))]
    assert names == [name for name in SOURCES if name not in ("shared", "phrases", "corpus")]
    assert make_sources(DraftConfig(method="none"), DraftStores(50)) == []


class Raising(OpenedAs):
    """A source whose sessions note every call, and raise in one of them."""

    def __init__(self, name: str, call: str = "") -> None:
        self.name, self.call = name, call
        self.opened: list[RaisingSession] = []

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> RaisingSession:
        if self.call == "open":
            raise OSError("broken on purpose")
        self.opened.append(RaisingSession(self.name, self.call))
        return self.opened[-1]

    def prepare(self) -> None:
        if self.call == "prepare":
            raise OSError("broken on purpose")


class RaisingSession:
    wants_hidden = True

    def __init__(self, name: str, call: str) -> None:
        self.name, self.call = name, call
        self.calls: list[str] = []

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.call:
            raise OSError("broken on purpose")

    def propose(self, budget: int) -> Proposal:
        self._note("propose")
        return proposal([4], [-1], self.name)

    def observe(self, tokens: TokenArray) -> None:
        self._note("observe")

    def learn(self, logits: NodeLogits) -> None:
        self._note("learn")

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        self._note("learn_hidden")

    def close(self) -> None:
        self._note("close")


CALLS = ["propose", "observe", "learn", "learn_hidden", "close"]
LOGITS = NodeLogits(np.zeros((1, 4), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))
PROMPT = np.array([1, 2], np.int32)


def steps(sessions: SourceSessions, count: int = 2) -> list[list[tuple[str, int]]]:
    """Name and length of each proposal of each step of a whole request."""
    proposed = []
    for _ in range(count):
        proposed.append([(each.source, len(each)) for each in sessions.propose(4)])
        sessions.observe(PROMPT)
        sessions.learn(LOGITS)
        sessions.learn_hidden(None, 0)
    sessions.close()
    return proposed


@pytest.mark.parametrize("call", CALLS)
def test_a_source_that_raises_is_left_out_for_the_request_and_the_others_go_on(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Raising("bad", call), Raising("good")
    hierarchy = SourceHierarchy([bad, good])
    proposed = steps(hierarchy.open(PROMPT))
    whole = [*CALLS[:4], *CALLS[:4], "close"]
    assert bad.opened[0].calls == whole[: whole.index(call) + 1]
    assert good.opened[0].calls == whole
    left = 0 if call == "propose" else 1
    later = 1 if call == "close" else 0
    assert proposed == [[("bad", left), ("good", 1)], [("bad", later), ("good", 1)]], "each in its place"
    assert hierarchy.failures == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"'bad' raised in {call}" in caplog.text
    assert steps(hierarchy.open(PROMPT), 1)[0][1] == ("good", 1)
    assert len(bad.opened) == 2, "the next request asks it again"
    assert hierarchy.failures == 2
    assert len(caplog.records) == 1, "and it is warned of once"


def test_a_source_that_cannot_open_keeps_its_place(caplog: pytest.LogCaptureFixture) -> None:
    hierarchy = SourceHierarchy([Raising("first"), Raising("bad", "open"), Raising("last")])
    sessions = hierarchy.open(PROMPT)
    assert steps(sessions, 1) == [[("first", 1), ("bad", 0), ("last", 1)]]
    assert hierarchy.failures == 1
    assert "'bad' raised in open" in caplog.text


def test_a_source_that_cannot_prepare_is_counted() -> None:
    hierarchy = SourceHierarchy([Raising("bad", "prepare"), Raising("good")])
    hierarchy.prepare()
    assert hierarchy.failures == 1


class Together(Raising):
    """Opens parallel samples in a way of its own."""

    counts: tuple[int, ...] = ()

    def open_parallel(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[RaisingSession]:
        self.counts = (*self.counts, count)
        return [self.open(prompt, references) for _ in range(count)]


def test_parallel_samples_have_sessions_of_their_own() -> None:
    together, apart = Together("together"), Raising("apart")
    hierarchy = SourceHierarchy([together, apart])
    requests = hierarchy.open_parallel(PROMPT, (), 3)
    requests[1].observe(PROMPT)
    for source in (together, apart):
        assert [session.calls for session in source.opened] == [[], ["observe"], []]
    assert together.counts == (3,)
    hierarchy.open(PROMPT)
    assert together.counts == (3,), "one request is opened as any"


def test_a_source_that_fails_in_one_sample_goes_on_in_the_others() -> None:
    bad = Raising("bad")
    first, second = SourceHierarchy([bad]).open_parallel(PROMPT, (), 2)
    bad.opened[0].call = "propose"
    assert [len(each) for each in first.propose(4)] == [0]
    assert [len(each) for each in second.propose(4)] == [1]


def test_only_sessions_that_want_hidden_states_get_them() -> None:
    one, other = RaisingSession("one", ""), RaisingSession("other", "")
    other.wants_hidden = False
    sessions = sessions_of(one, other)
    assert sessions.wants_hidden
    sessions.learn_hidden(None, 0)
    assert (one.calls, other.calls) == (["learn_hidden"], [])
    assert not sessions_of(other).wants_hidden
