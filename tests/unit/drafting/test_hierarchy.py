"""Tests of the hierarchy of sources."""

import numpy as np
import pytest

from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.phrases import PhraseTable
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.source import Proposal
from tests.support.sources import sessions_of


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
    assert names == ["automaton", "adjacency", "siblings", "history"]
    assert make_sources(DraftConfig(method="none"), DraftStores(50)) == []
