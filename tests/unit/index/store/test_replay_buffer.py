"""Tests of what finds the entries that Redis has lost."""

import time

import pytest

from retrieval_draft.index.store import replay_buffer as recent
from retrieval_draft.index.store.replay_buffer import ReplayBuffer


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(recent, "_PATIENCE", (0.0, 0.0))


def filled(now: float) -> ReplayBuffer:
    made = ReplayBuffer(5.0)
    for number in range(10):
        made.note(b"s", number, b"%d" % number, now - 9 + number)
    return made


def test_what_is_not_seen_again_is_missing_once() -> None:
    now = time.monotonic()
    made = filled(now)
    assert not made.missing()
    made.mark_lost(now)
    assert made.is_suspicious
    for number in range(7):
        made.seen(b"s", number)
    made.seen(b"other", 8)
    assert not made.missing()  # the log has not been read to its end yet
    made.caught_up()
    assert made.missing() == [b"7", b"8", b"9"]
    assert not made.missing()
    assert not made.is_suspicious


def test_old_entries_are_forgotten() -> None:
    now = time.monotonic()
    made = filled(now)
    assert made.nbytes == 6
    made.mark_lost(now - 2)
    made.caught_up()
    assert made.missing() == [b"4", b"5", b"6", b"7", b"8", b"9"]
    made = filled(now)
    made.mark_lost(now + 3)  # entries of more than five seconds before are safe
    made.caught_up()
    assert made.missing() == [b"7", b"8", b"9"]


def test_bytes_have_a_cap(monkeypatch) -> None:
    monkeypatch.setattr(recent, "_MAX_BYTES", 10)
    made = ReplayBuffer(5.0)
    for number in range(10):
        made.note(b"s", number, bytes(4), 0.0)
    assert made.nbytes == 8
