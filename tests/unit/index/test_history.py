"""Tests of the history of earlier requests."""

import os
import threading

import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.history import History, HistorySource
from tests.support.tokens import ids

NONE = np.empty(0, np.int32)


def drafts(history: History, *text: int) -> list[int]:
    return HistorySource(history).open(ids(*text)).propose(8).tokens.tolist()


@pytest.fixture
def history():
    made = History(100, 1 << 20)
    yield made
    made.close()


def texts(history: History) -> list[list[int]]:
    """The texts that are held."""
    found = []
    for segment in history.segments:
        joined = segment.texts(100).tolist()
        while joined:
            end = joined.index(100)
            found.append(joined[:end])
            joined = joined[end + 1 :]
    return found


def test_a_finished_request_is_drafted_from(history) -> None:
    session = HistorySource(history).open(ids(1, 2, 3))
    assert len(session.propose(8)) == 0
    session.observe(ids(4, 5))
    session.observe(ids(6))
    session.close()
    assert history.flush(10)
    assert drafts(history, 9, 3, 4) == [5, 6]
    assert drafts(history, 2, 3) == [4, 5, 6]  # the reply follows the prompt


@pytest.mark.parametrize(
    ("prompts", "replies", "expected"),
    [
        (True, True, [[1, 2, 3, 4, 5, 6]]),
        (True, False, [[1, 2, 3, 4]]),
        (False, True, [[5, 6]]),
        (False, False, []),
    ],
)
def test_prompts_and_replies_can_be_left_out(history, prompts, replies, expected) -> None:
    session = HistorySource(history, prompts, replies).open(ids(1, 2, 3, 4))
    session.observe(ids(5, 6))
    session.close()
    history.flush(10)
    assert texts(history) == expected


def test_a_conversation_that_comes_again_is_stored_once(history) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(0, 90, 300).astype(np.int32)
    history.add(prompt, ids(1, 2))
    history.flush(10)
    longer = np.concatenate((prompt, ids(1, 2, 91, 92, 93)))
    history.add(longer, ids(94, 95))
    history.flush(10)
    # The new turn, with the 31 tokens that lead to it.
    assert texts(history)[1] == [*longer[-34:].tolist(), 94, 95]
    assert drafts(history, 91, 92) == [93, 94, 95]


def test_a_reply_said_twice_counts_twice(history) -> None:
    for reply in ((5, 6), (5, 7), (5, 7)):
        history.add(NONE, ids(4, *reply))
        history.flush(10)
    assert drafts(history, 4, 5)[0] == 7


def test_segments_are_merged(history) -> None:
    random = np.random.default_rng(0)
    for _ in range(64):
        history.add(NONE, random.integers(0, 100, 100).astype(np.int32))
        history.flush(10)
    assert history.num_tokens == 6400
    assert len(history.segments) <= 4
    assert history.failures == 0


def test_the_oldest_goes_first() -> None:
    history = History(100, 1 << 20)
    random = np.random.default_rng(0)
    history.add(NONE, ids(1, 2, 1, 3, 1, 4))
    for _ in range(40):
        history.add(NONE, random.integers(10, 100, 10_000).astype(np.int32))
        history.flush(10)
    assert history.nbytes <= 1 << 20
    assert history.evicted >= 6
    assert history.num_tokens > 100_000
    assert drafts(history, 1, 2, 1) == []
    history.close()


def test_ids_the_vocabulary_does_not_have_are_left_out(history) -> None:
    history.add(NONE, ids(5, 6, 5000, 7))
    history.flush(10)
    assert drafts(history, 5, 6) == [7]


def test_too_much_at_once_drops_the_oldest(history, monkeypatch) -> None:
    monkeypatch.setattr("retrieval_draft.index.history.QUEUE_TOKENS", 10)
    held = threading.Event()
    monkeypatch.setattr(History, "_ingest", lambda self, taken: held.wait(5))
    history.add(NONE, ids(1, 2))
    while history._waiting:
        pass
    for _ in range(4):
        history.add(NONE, ids(*range(6)))
    assert history.dropped == 3
    held.set()


def test_a_restart_finds_it_again(tmp_path) -> None:
    first = History(100, 1 << 20, tmp_path, "f")
    first.add(ids(1, 2), ids(3, 4))
    first.close()
    second = History(100, 1 << 20, tmp_path, "f")
    assert drafts(second, 1, 2) == [3, 4]
    second.add(NONE, ids(7, 8, 9))
    second.close()
    third = History(100, 1 << 20, tmp_path, "f")
    assert drafts(third, 7, 8) == [9]
    assert drafts(third, 1, 2) == [3, 4]
    third.close()


def test_another_tokenizers_folder_is_refused(tmp_path) -> None:
    History(100, 1 << 20, tmp_path, "f").close()
    with pytest.raises(TokenizerMismatchError):
        History(100, 1 << 20, tmp_path, "g")


def test_two_processes_do_not_write_one_folder(tmp_path, caplog) -> None:
    first = History(100, 1 << 20, tmp_path)
    first.add(NONE, ids(1, 2, 3))
    first.flush(10)
    second = History(100, 1 << 20, tmp_path)
    assert "another process" in caplog.text
    assert drafts(second, 1, 2) == [3]
    second.add(NONE, ids(7, 8, 9))
    second.flush(10)
    assert drafts(second, 7, 8) == [9]
    first.close()
    second.close()
    third = History(100, 1 << 20, tmp_path)
    assert drafts(third, 7, 8) == []
    third.close()


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch, caplog) -> None:
    first = History(100, 1 << 20, tmp_path / "kept", "f")
    first.add(NONE, ids(1, 2, 3))
    first.close()
    real = os.open

    def read_only(path, flags, *more, **named):
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    second = History(100, 1 << 20, tmp_path / "kept", "f")
    assert "Read-only file system" in caplog.text
    assert len(caplog.records) == 1
    assert drafts(second, 1, 2) == [3]
    second.add(NONE, ids(7, 8, 9))
    assert second.flush(10)
    assert drafts(second, 7, 8) == [9]
    second.close()
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    history = History(100, 1 << 20, tmp_path / "file" / "history", "f")
    assert "kept in memory only" in caplog.text
    history.add(NONE, ids(1, 2, 3))
    assert history.flush(10)
    assert drafts(history, 1, 2) == [3]
    history.close()
    with pytest.raises(DatastoreError, match="is a file"):  # a mistake, not a disk that fails
        History(100, 1 << 20, tmp_path / "file", "f")


def test_a_disk_that_fails_costs_no_drafts(tmp_path, monkeypatch, caplog) -> None:
    history = History(100, 1 << 20, tmp_path)

    def full(path, array) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("retrieval_draft.index.segments.segment.save_array", full)
        for reply in ((1, 2, 3), (1, 2, 3)):
            history.add(NONE, ids(*reply))
            assert history.flush(10)
        assert drafts(history, 1, 2) == [3]
    assert history.failures == 2
    assert caplog.text.count("not kept on disk") == 1
    history.add(NONE, ids(7, 8, 9))  # space again: everything is written
    history.close()
    again = History(100, 1 << 20, tmp_path)
    assert drafts(again, 1, 2) == [3]
    assert drafts(again, 7, 8) == [9]
    again.close()


def test_it_needs_some_room() -> None:
    with pytest.raises(InvalidInputError, match="max_bytes"):
        History(100, 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_goes_on_with_a_history_of_its_own(tmp_path) -> None:
    history = History(100, 1 << 20, tmp_path)
    history.add(NONE, ids(1, 2, 3))
    history.flush(10)
    child = os.fork()
    if child == 0:
        history.add(NONE, ids(7, 8, 9))
        good = history.flush(10) and drafts(history, 7, 8) == [9] and drafts(history, 1, 2) == [3]
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert drafts(history, 7, 8) == []
    history.close()
    again = History(100, 1 << 20, tmp_path)
    assert drafts(again, 7, 8) == []
    again.close()
