"""Every store's texts in one datastore, and finished requests in it."""

from __future__ import annotations

from types import SimpleNamespace

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import LookupSession
from retrieval_draft.methods.method import MethodContext
from tests.support.tokens import ids


def holder(*tokens):
    """A corpus, or a shared store, of one text."""
    return SimpleNamespace(
        segments=(Segment.build([ids(*tokens)], 50),), nbytes=10, flush=lambda: flushed.append(tokens)
    )


flushed: list[tuple[int, ...]] = []


def datastore(earlier=True, **stores):
    return Datastore(MethodContext(DraftConfig(), DraftStores(50, **stores)), earlier)


def test_every_store_is_looked_up():
    store = datastore(corpora=(holder(1, 2),), shared=holder(3, 4))
    texts = [segment.tokens[:-1].tolist() for segment in store.open([ids(5, 6), ids(7)])]
    assert texts == [[5, 6, 50, 7], [1, 2], [3, 4]]
    assert [segment.tokens[:-1].tolist() for segment in store.corpora] == [[1, 2]]
    assert [segment.tokens[:-1].tolist() for segment in store.learned] == [[3, 4]]
    assert store.nbytes == 20
    store.flush()
    assert flushed == [(3, 4)]
    store.close()


def test_the_level_is_that_of_the_largest_store():
    assert datastore(corpora=(holder(1),), shared=holder(2)).level == "corpus"
    assert datastore(shared=holder(2)).level == "shared"
    assert datastore().level == "history"


class Recorder(LookupSession):
    def __init__(self, prompt):
        super().__init__(prompt)
        self.learned = []

    def propose(self, budget):
        return budget

    def learn(self, logits):
        self.learned.append(logits)


def test_a_source_keeps_the_text_of_its_requests():
    store, opened = datastore(), []

    def open_session(prompt, references):
        opened.append(Recorder(prompt))
        return opened[-1]

    source = StoredSource("mine", store, open_session, lambda: 5, level="corpus")
    session = source.open(ids(1, 2))
    session.observe(ids(3))
    session.learn("logits")
    assert session.propose(4) == 4
    assert opened[0].text == [1, 2, 3]
    assert opened[0].learned == ["logits"]
    assert not store.learned
    session.close()
    source.flush()
    (segment,) = store.learned
    assert sorted(segment.tokens.tolist()) in ([1, 2, 3, 50], [1, 2, 3, 50, 50])
    assert source.nbytes == store.nbytes + 5 > 5
    assert source.level == "corpus"
    source.close()


def test_requests_need_not_be_kept():
    store = datastore(earlier=False)
    source = StoredSource("mine", store, lambda prompt, references: Recorder(prompt))
    source.open(ids(1, 2)).close()
    source.flush()
    assert store.open() == ()
