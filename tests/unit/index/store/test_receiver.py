"""Receiving: the log read to its end, each entry once, whatever happens to Redis in between."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from retrieval_draft.index.store import replay_buffer
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.log_replica import LogReplica
from retrieval_draft.index.store.receiver import OVERLAP, Receiver
from tests.support.fake_redis import FakeRedis, Turns

A, B = b"a" * 16, b"b" * 16
CODEC = EntryCodec("f:t", None, 1 << 15)


class Receiving:
    """A receiver of two streams over a Redis in this process; `turn` is one turn of its thread."""

    def __init__(self) -> None:
        self.counts, self.turns, self.redis = StoreCounts(), Turns(), FakeRedis()
        self.mirror = LogReplica(1000, CODEC, StoreConfig("redis://there"), self.counts)
        self.back: list[bytes] = []
        self.losses, self.merges = 0, 0
        turns: Any = self.turns
        self.receiver = Receiver(
            {"0": b"zero", "1": b"one"}, self.mirror, CODEC.most_bytes, turns, False, threading.Event(),
            self._merge, self._lose, self.back.extend,
        )  # fmt: skip
        self.receiver.run()
        self.client = self.redis.client()

    def _merge(self) -> None:
        self.merges += 1
        self.mirror.sort()

    def _lose(self) -> None:
        self.losses += 1

    def add(self, server: bytes, *sequences: int, key: bytes = b"zero", at: int | None = None) -> None:
        for sequence in sequences:
            self.redis.add(key, CODEC.encode(server, sequence, np.array([sequence, 7], np.int32)), at)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.turns.work(self.client)

    def reconnect(self, run_id: str | None = None) -> None:
        self.turns.lost()
        self.client = self.redis.client()
        self.redis.run_id = run_id or self.redis.run_id

    def known(self, server: bytes = A) -> list[int]:
        """First and last number of each range of entries that are in."""
        found = self.mirror.writers().get(server)
        return [] if found is None else found.bounds

    def looked_up(self) -> int:
        """Entries that can be looked up."""
        return sum(segment.texts(1000).tolist().count(1000) for segment in self.mirror.segments)


def test_all_streams_are_read_to_their_ends_and_each_entry_is_in_once() -> None:
    made = Receiving()
    made.add(A, *range(10))
    made.add(B, *range(3), key=b"one")
    made.turn()
    assert not made.receiver.caught_up.is_set(), "four entries a read: there is more"
    made.turn(3)
    assert made.receiver.caught_up.is_set()
    assert (made.known(A), made.known(B), made.looked_up()) == ([0, 9], [0, 2], 13)
    made.turn(3)
    made.add(A, 10)
    made.turn()
    assert (made.known(A), made.looked_up(), made.counts.duplicates) == ([0, 10], 14, 0)
    assert made.counts.received == 14


def test_the_same_redis_is_read_on_from_where_it_was() -> None:
    made = Receiving()
    made.add(A, 0, 1)
    made.turn(2)
    made.reconnect()
    made.add(A, 2)
    made.turn(2)
    assert (made.known(), made.counts.rereads, made.counts.duplicates) == ([0, 2], 0, 0)
    assert made.losses == 1


def test_after_a_failover_the_last_minute_is_read_again() -> None:
    made = Receiving()
    made.add(A, 0, at=1_000_000)
    made.add(A, 1, at=1_000_000 + OVERLAP + 5)
    made.turn(2)
    made.reconnect("second")
    made.add(A, 2, at=1_000_010)  # the new master's clock is behind
    made.turn(2)
    assert (made.known(), made.looked_up()) == ([0, 2], 3)
    assert made.counts.duplicates == 1, "the second entry; the first is older than that"


def test_a_log_that_was_wiped_is_read_from_its_start() -> None:
    made = Receiving()
    made.add(A, 0, 1)
    made.turn(2)
    made.redis.wipe()
    made.reconnect("second")
    made.add(A, 1, at=5)
    made.add(A, 2, at=6)
    made.turn()
    assert (made.known(), made.looked_up(), made.counts.duplicates) == ([0, 2], 3, 1), "at once"


def test_a_stream_that_was_deleted_meanwhile_is_noticed_without_a_new_connection() -> None:
    made = Receiving()
    made.add(A, 0, 1)
    made.turn(2)
    made.redis.wipe()
    made.add(A, 2, at=5)
    made.turn(3)
    assert (made.known(), made.looked_up()) == ([0, 2], 3)


def test_a_torn_entry_does_not_stop_those_after_it() -> None:
    made = Receiving()
    made.add(A, 0)
    made.redis.add(b"zero", CODEC.encode(A, 1, np.array([1, 7], np.int32))[:-2])
    made.add(A, 2)
    made.turn(3)
    assert (made.known(), made.counts.dropped) == ([0, 0, 2, 2], {"malformed": 1})


def test_what_a_crash_lost_is_handed_back_once(monkeypatch) -> None:
    monkeypatch.setattr(replay_buffer, "_PATIENCE", (0.0, 0.0))
    made = Receiving()
    made.add(A, 0, 1, 2)
    made.turn(2)
    kept = made.redis.streams[b"zero"][:2]
    made.redis.wipe()
    for name, payload in kept:
        made.redis.add(b"zero", payload, int(name.split(b"-")[0]))
    made.reconnect("second")
    made.turn(4)
    assert [CODEC.decode(payload).sequence for payload in made.back] == [2]
    assert (made.known(), made.looked_up()) == ([0, 2], 3)


def test_a_connection_that_broke_hands_nothing_back_while_the_log_is_whole(monkeypatch) -> None:
    monkeypatch.setattr(replay_buffer, "_PATIENCE", (0.0, 0.0))
    made = Receiving()
    made.add(A, 0, 1, 2)
    made.turn(2)
    made.reconnect("second")
    made.turn(4)
    assert made.back == []


def test_what_was_read_can_be_looked_up_when_the_connection_breaks() -> None:
    made = Receiving()
    made.add(A, *range(8))
    made.turn()  # half of it
    made.turns.lost()
    assert made.looked_up() == made.mirror.entries == 4


@pytest.mark.parametrize("sizes", [[1], [4], [5], [4, 4]])
def test_all_is_published_at_the_end_however_much_comes_at_once(sizes: list[int]) -> None:
    made, sequence = Receiving(), 0
    made.turn()
    for size in sizes:
        made.add(A, *range(sequence, sequence + size))
        sequence += size
        made.turn(3)
        assert made.looked_up() == sequence
        assert made.mirror.waiting_tokens == 0
