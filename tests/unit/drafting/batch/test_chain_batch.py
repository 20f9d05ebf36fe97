"""Chains for many requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.batch import ChainBatch
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.phrases import PhraseTable
from retrieval_draft.proposer import Proposer

VOCABULARY = 500


def _ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def _batch(*sources: str, **options: object) -> ChainBatch:
    config = DraftConfig(sources=sources, adjacency_rows=1024)
    return ChainBatch(DraftStores(VOCABULARY), config, **options)  # type: ignore[arg-type]


@pytest.fixture
def batch() -> Iterator[ChainBatch]:
    made = _batch("automaton", "adjacency", "history", max_chain=8)
    yield made
    made.shut_down()


def test_what_followed_before_is_proposed(batch: ChainBatch) -> None:
    session = batch.open(_ids(7, 8, 9, 4, 5, 6, 7, 8))
    tokens, lengths, probs = batch.step([session], [9], [1], min_prob=0.0)
    assert tokens.shape == probs.shape == (1, 8)
    assert tokens[0, :3].tolist() == [4, 5, 6]
    size = int(lengths[0])
    assert (tokens[0, size:] == -1).all()
    assert (probs[0, size:] == 0).all()
    assert (np.diff(probs[0, :size]) <= 0).all()
    assert probs[0, 0] <= 1
    assert batch.text(session).tolist() == [7, 8, 9, 4, 5, 6, 7, 8, 9]


def test_a_chain_may_have_256_tokens() -> None:
    made = _batch("automaton", "adjacency", "history", max_chain=256)
    text = np.random.default_rng(1).integers(0, VOCABULARY, 300).astype(np.int32)
    for _ in range(8):  # the first ones teach that long copies are right
        session = made.open(np.concatenate((text, text[:40])))
        tokens, lengths, probs = made.step([session], [], [0], min_prob=1e-9)
        assert tokens.shape == (1, 256)
        length = int(lengths[0])
        assert tokens[0, :length].tolist() == text[40 : 40 + length].tolist()
        assert made.step([session], text[40:], [260])[1][0] >= 0
        made.close(session)
    assert length == 256
    assert (np.diff(probs[0]) <= 0).all()
    made.shut_down()


def test_token_0_is_a_token(batch: ChainBatch) -> None:
    session = batch.open(_ids(0, 3, 0, 3, 0))
    tokens, lengths, _ = batch.step([session], [], [0], min_prob=0.0)
    assert lengths[0] > 0
    assert tokens[0, :2].tolist() == [3, 0]


def test_rows_are_answered_in_the_order_asked(batch: ChainBatch) -> None:
    first = batch.open(_ids(1, 2, 3, 1, 2))
    second = batch.open(_ids(4, 5, 6, 4, 5))
    third = batch.open(_ids(10, 11, 12))
    tokens, lengths, _ = batch.step([second, third, first], [], [0, 0, 0])
    assert tokens[0, 0] == 6
    assert lengths[1] == 0
    assert tokens[2, 0] == 3


def test_limits_are_kept_by_row_and_by_floor(batch: ChainBatch) -> None:
    text = np.tile(np.arange(20, 30, dtype=np.int32), 5)
    ids = [batch.open(text) for _ in range(3)]
    _, lengths, _ = batch.step(ids, [], [0, 0, 0], np.array([0, 3, 100]))
    assert lengths.tolist() == [0, 3, 8]
    _, _, probs = batch.step(ids[:1], [], [0], min_prob=0.0)
    min_prob = float(probs[0, 2])
    _, lengths, cut = batch.step(ids[:1], [], [0], min_prob=min_prob)
    assert lengths[0] >= 3
    assert (cut[0, : lengths[0]] >= np.float32(min_prob)).all()
    _, lengths, _ = batch.step(ids[:1], [], [0], min_prob=1.0)
    assert lengths[0] == 0


def test_a_finished_request_is_drafted_from_by_the_next() -> None:
    batch = _batch("history")
    first = batch.open(_ids(50, 51, 52))
    batch.step([first], [53, 54, 55], [3])
    batch.close(first)
    batch.flush()
    session = batch.open(_ids(9, 51, 52))
    tokens, lengths, _ = batch.step([session], [53], [1], min_prob=0.0)
    assert lengths[0] >= 2
    assert tokens[0, :2].tolist() == [54, 55]
    batch.shut_down()


def test_open_sessions_notice_new_history() -> None:
    batch = _batch("history")
    waiting = batch.open(_ids(1, 60, 61))
    assert batch.step([waiting], [], [0])[1][0] == 0
    first = batch.open(_ids(60, 61, 62, 63))
    batch.close(first)
    batch.flush()
    tokens, _, _ = batch.step([waiting], [62], [1])
    assert tokens[0, 0] == 63
    batch.shut_down()


def test_requests_see_nothing_of_each_others_text() -> None:
    batch = _batch("automaton")
    first = batch.open(_ids(1, 2, 3, 4, 1, 2, 3, 4))
    second = batch.open(_ids(1, 2))
    _, lengths, _ = batch.step([first, second], [], [0, 0])
    assert lengths[0] > 0
    assert lengths[1] == 0
    batch.close(first)
    third = batch.open(_ids(1, 2))  # in the first one's slot
    assert batch.step([third], [3], [1])[1][0] == 0
    batch.shut_down()


def test_references_are_drafted_from(batch: ChainBatch) -> None:
    session = batch.open(_ids(1), [_ids(30, 31, 32, 33)])
    tokens, _, _ = batch.step([session], [30, 31], [2], min_prob=0.0)
    assert tokens[0, :2].tolist() == [32, 33]


def test_phrases_are_drafted_from() -> None:
    config = DraftConfig(sources=("phrases",))
    batch = ChainBatch(DraftStores(VOCABULARY, phrases=PhraseTable([_ids(5, 6, 7, 8, 9)])), config)
    session = batch.open(_ids(1))
    tokens, _, _ = batch.step([session], [5, 6, 7], [3], min_prob=0.0)
    assert tokens[0, :2].tolist() == [8, 9]
    batch.shut_down()


def test_a_batch_of_a_proposer_shares_its_history() -> None:
    with Proposer.for_tokenizer(None, vocabulary=VOCABULARY) as proposer:
        batch = ChainBatch(proposer.stores, proposer.config, max_chain=4, sources=proposer.sources)
        earlier = proposer.open(_ids(70, 71, 72, 73, 74))
        earlier.close()
        proposer.flush()
        session = batch.open(_ids(3))
        tokens, _, _ = batch.step([session], [70, 71, 72], [3], min_prob=0.0)
        assert tokens[0, :2].tolist() == [73, 74]
        batch.shut_down()
        assert len(proposer.open(_ids(70, 71, 72)).propose(8)) > 1  # it is not closed with the batch


def test_long_texts_grow_their_arrays(batch: ChainBatch) -> None:
    random = np.random.default_rng(0)
    ids = [batch.open(random.integers(0, VOCABULARY, 20, np.int32)) for _ in range(20)]
    emitted = random.integers(0, VOCABULARY, (20, 4000), np.int32)
    for begin in range(0, 4000, 500):
        batch.step(ids, emitted[:, begin : begin + 500].ravel(), [500] * 20)
    for session, text in zip(ids, emitted, strict=True):
        assert batch.text(session)[20:].tolist() == text.tolist()
    tokens, _, _ = batch.step(ids[:1], emitted[0, 100:112], [12])
    assert tokens[0, 0] == emitted[0, 112]


def test_threads_change_nothing() -> None:
    random = np.random.default_rng(1)
    prompts = random.integers(0, 6, (40, 60)).astype(np.int32)
    emitted = random.integers(0, 6, (5, 40, 2)).astype(np.int32)
    results = []
    for threads in (1, 3):
        batch = _batch("automaton", "adjacency", threads=threads)
        ids = [batch.open(prompt) for prompt in prompts]
        results.append([batch.step(ids, step.ravel(), [2] * 40) for step in emitted])
        batch.shut_down()
    for one, other in zip(*results, strict=True):
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)


def test_acceptance_is_counted_and_learned(batch: ChainBatch) -> None:
    text = np.tile(_ids(11, 12, 13, 14, 15), 6)
    session = batch.open(text)
    before = batch.calibration.expected.sum()
    _, lengths, _ = batch.step([session], [11], [1], 3)
    batch.step([session], [12, 13, 99], [3])
    assert batch.counts.drafted == lengths[0] == 3
    assert batch.counts.accepted == 2
    assert batch.calibration.expected.sum() > before
    assert (batch.counts.requests, batch.counts.steps, batch.counts.rows, batch.counts.tokens) == (1, 2, 2, 4)


def test_wrong_guesses_shorten_chains() -> None:
    batch = _batch("automaton")
    session = batch.open(np.tile(_ids(1, 2, 3), 10))
    chains = []
    for token in range(100, 200):
        # The text comes back to a position that it knows, and goes on otherwise every time.
        _, lengths, _ = batch.step([session], [token, 1, 2], [3])
        chains.append(int(lengths[0]))
    assert np.mean(chains[-20:]) < np.mean(chains[:5])
    batch.shut_down()


def test_bytes_are_given_back(batch: ChainBatch) -> None:
    empty = batch.nbytes
    ids = [batch.open(np.arange(400, dtype=np.int32)) for _ in range(4)]
    assert batch.nbytes > empty + 4 * 400 * 4
    assert len(batch) == 4
    for session in ids:
        batch.close(session, finished=False)
    assert len(batch) == 0
    batch.flush()
    open_again = batch.open(np.arange(400, dtype=np.int32))
    batch.close(open_again)


def test_none_drafts_nothing() -> None:
    batch = ChainBatch(DraftStores(VOCABULARY), DraftConfig(method="none"))
    session = batch.open(_ids(1, 2, 1, 2))
    assert batch.step([session], [1], [1])[1].tolist() == [0]
    batch.shut_down()


def test_what_is_wrong_is_refused_and_changes_nothing(batch: ChainBatch) -> None:
    session = batch.open(_ids(1, 2, 3, 1, 2))
    closed = batch.open(_ids(1))
    batch.close(closed)
    for ids, tokens, counts in (
        ([closed], [1], [1]),
        ([-1], [1], [1]),
        ([1 << 40], [1], [1]),
        ([session, session], [1, 1], [1, 1]),
        ([session], [1, 2], [1]),
        ([session], [VOCABULARY], [1]),
        ([session], [-1], [1]),
        ([session, closed], [1, 1], [1, 1]),
        ([session], [1], [1, 0]),
        ([session], [], [-1]),
        ([session], [0.5], [1]),
    ):
        with pytest.raises(InvalidInputError):
            batch.step(ids, np.array(tokens), counts)
    with pytest.raises(InvalidInputError):
        batch.step([session], [1], [1], [1, 2])
    assert batch.text(session).tolist() == [1, 2, 3, 1, 2]
    with pytest.raises(InvalidInputError):
        batch.close(closed)
    with pytest.raises(InvalidInputError):
        batch.open(_ids())
    with pytest.raises(InvalidInputError):
        batch.open(_ids(VOCABULARY))
    with pytest.raises(InvalidInputError):
        batch.text(closed)
    assert batch.step([session], [], [0])[0][0, 0] == 3


@pytest.mark.parametrize(
    "options", [{"max_chain": 0}, {"max_chain": 257}, {"threads": 0}, {"config": DraftConfig(method="rest")}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        ChainBatch(DraftStores(VOCABULARY), **options)  # type: ignore[arg-type]


def test_an_empty_step_is_allowed(batch: ChainBatch) -> None:
    tokens, lengths, probs = batch.step([], [], [])
    assert tokens.shape == probs.shape == (0, 8)
    assert lengths.shape == (0,)


def test_what_was_learned_is_kept_beside_the_history(tmp_path: Path) -> None:
    config = DraftConfig(sources=("automaton", "history"), history_folder=str(tmp_path))
    batch = ChainBatch(DraftStores(VOCABULARY), config)
    session = batch.open(np.tile(_ids(11, 12, 13), 6))
    batch.step([session], [11], [1])
    batch.step([session], [99], [1])
    batch.shut_down()
    again = ChainBatch(DraftStores(VOCABULARY), config)
    fresh = _batch("automaton")
    np.testing.assert_allclose(again.calibration.accepted, batch.calibration.accepted, rtol=1e-6)
    assert (again.calibration.expected != fresh.calibration.expected).any()
    again.shut_down()
    fresh.shut_down()
