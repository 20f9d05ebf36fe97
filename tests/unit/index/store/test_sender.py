"""Sending: every entry that was accepted stays or goes again, in order, and a reader has it once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ConnectionError, NoPermissionError, ResponseError

from retrieval_draft.index.store import sender as sender_module
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.log_replica import LogReplica
from retrieval_draft.index.store.outbox import Outbox
from retrieval_draft.index.store.sender import Sender
from tests.support.fake_redis import FakeRedis, Turns

VOCABULARY, SERVER, KEY, OTHER = 5000, b"s" * 16, b"log", b"other"
NOTHING = np.empty(0, np.int32)


class Sending:
    """A sender over a Redis in this process; `turn` is one turn of its thread."""

    def __init__(self, **options: Any) -> None:
        config = StoreConfig("redis://there", **options)
        self.codec = EntryCodec("f:t", None, config.max_tokens)
        self.counts, self.outbox, self.turns, self.redis = (
            StoreCounts(),
            Outbox(1 << 20),
            Turns(),
            FakeRedis(),
        )
        self.mirror = LogReplica(VOCABULARY, self.codec, config, StoreCounts())
        turns: Any = self.turns
        self.sender = Sender(
            SERVER, [KEY, OTHER], self.outbox, self.mirror, self.codec, turns, config, self.counts,
            VOCABULARY, False, threading.Event(), 1 << 20,
        )  # fmt: skip
        self.sender.run()
        self.client = self.redis.client()

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.outbox.put(NOTHING, np.array([number, number + 1], np.int32))

    def turn(self) -> None:
        self.outbox.wake()
        self.turns.work(self.client)

    def fails(self, error: type[Exception] = ConnectionError) -> None:
        """A turn that raises, and what the worker does then."""
        with pytest.raises(error):
            self.turn()
        self.turns.lost()
        self.client = self.redis.client()

    def sent(self, key: bytes = KEY) -> list[tuple[int, int]]:
        """Sequence number and first token of each entry in the stream."""
        entries = [self.codec.decode(payload) for payload in self.redis.payloads(key)]
        return [(entry.sequence, int(np.frombuffer(entry.tokens, "<u4")[0])) for entry in entries]

    def read(self) -> int:
        """Entries that a reader of the stream takes in."""
        reader = LogReplica(VOCABULARY, self.codec, StoreConfig("redis://there"), StoreCounts())
        reader.take("0", [[name, [b"e", payload]] for name, payload in self.redis.streams[KEY]])
        return reader.entries


def test_runs_go_in_order_and_are_counted() -> None:
    made = Sending()
    made.put(7, 9)
    assert not made.sender.idle
    made.turn()
    made.put(4)
    made.turn()
    assert made.sent() == [(0, 7), (1, 9), (2, 4)]
    assert (made.counts.sent, made.counts.resent, made.sender.idle) == (3, 0, True)


def test_what_redis_refused_and_all_after_it_goes_again_and_nothing_before_it() -> None:
    made = Sending()
    made.put(1, 2, 3)
    made.redis.accepts = 1
    made.fails(ResponseError)
    assert made.sent() == [(0, 1)]
    assert not made.sender.idle
    made.redis.accepts = None
    made.put(4)
    made.turn()
    made.turn()
    assert made.sent() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert (made.counts.sent, made.counts.resent) == (4, 0)


def test_without_an_answer_all_goes_again_and_a_reader_has_it_once() -> None:
    made = Sending()
    made.put(1, 2)
    made.redis.dies = True
    made.fails()
    made.turn()
    assert made.sent() == [(0, 1), (1, 2), (0, 1), (1, 2)]
    assert made.read() == 2
    assert made.counts.sent == 2


def test_another_connection_to_the_same_redis_sends_nothing_again() -> None:
    made = Sending()
    made.put(1, 2)
    made.turn()
    made.turns.lost()
    made.client = made.redis.client()
    made.turn()
    assert made.sent() == [(0, 1), (1, 2)]


def test_after_a_crash_of_redis_what_it_took_goes_again_before_what_is_new() -> None:
    made = Sending()
    made.put(1, 2)
    made.turn()
    made.redis.wipe()
    made.redis.run_id = "second"
    made.redis.dies = True
    made.put(3)
    made.fails()
    made.turn()
    made.turn()
    assert made.sent() == [(2, 3), (0, 1), (1, 2), (2, 3)], "the first of it without an answer"
    assert made.read() == 3
    assert (made.counts.sent, made.counts.resent) == (3, 2)


def test_a_restart_that_another_thread_noticed_is_looked_for() -> None:
    made = Sending()
    made.put(1)
    made.turn()
    made.redis.wipe()
    made.redis.run_id = "second"
    made.sender.look_again()  # this connection works on, through a proxy for one
    made.turn()
    assert made.sent() == [(0, 1)]
    assert made.counts.resent == 1


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_was_accepted_long_before_the_crash_is_safe(goes_on: bool, monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0, time=lambda: 0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(sender_module, "time", clock)
    made = Sending(timeout=2.0)
    made.put(1)
    made.turn()
    clock.now += 8.0  # kept for five seconds and the timeout
    if goes_on:
        made.put(2)
        made.turn()
    made.redis.wipe()
    made.redis.run_id = "second"
    made.sender.look_again()
    made.turn()
    assert made.sent() == ([(1, 2)] if goes_on else [])


def test_what_others_lost_is_put_back() -> None:
    made = Sending()
    lost = made.codec.encode(b"o" * 16, 5, np.array([8, 8], np.int32))
    made.sender.put_back([lost])
    made.put(1)
    made.turn()
    assert made.sent() == [(5, 8), (0, 1)]
    assert (made.counts.sent, made.counts.resent) == (1, 1)
    assert made.sender.idle


def test_a_long_run_is_cut_so_that_no_context_is_lost() -> None:
    made = Sending(max_tokens=64)
    whole = np.arange(150, dtype=np.int32)
    made.outbox.put(NOTHING, whole)
    made.turn()
    pieces = [np.frombuffer(made.codec.decode(each).tokens, "<u4") for each in made.redis.payloads(KEY)]
    assert max(map(len, pieces)) == 64
    windows = {
        tuple(piece[begin : begin + 32].tolist()) for piece in pieces for begin in range(len(piece) - 31)
    }
    assert windows == {tuple(range(begin, begin + 32)) for begin in range(119)}


def test_ids_that_nobody_could_use_are_left_out_and_so_are_single_tokens() -> None:
    made = Sending()
    made.outbox.put(NOTHING, np.array([3, VOCABULARY, -1, 4], np.int32))
    made.outbox.put(NOTHING, np.array([5], np.int32))
    made.turn()
    tokens = [
        np.frombuffer(made.codec.decode(each).tokens, "<u4").tolist() for each in made.redis.payloads(KEY)
    ]
    assert tokens == [[3, 4]]
    assert made.sender.idle


def test_where_something_else_has_the_streams_name_another_is_used() -> None:
    made = Sending()
    made.put(1)
    made.redis.accepts, made.redis.refusal = 0, ResponseError("WRONGTYPE Operation against a key")
    made.fails(ResponseError)
    made.redis.accepts = None
    made.turn()
    assert (made.sent(KEY), made.sent(OTHER)) == ([], [(0, 1)])


def test_a_stream_without_ids_left_is_given_some(monkeypatch) -> None:
    made = Sending()
    made.put(1)
    made.redis.accepts, made.redis.refusal = 0, ResponseError("The stream has exhausted the last possible ID")
    revived: list[Any] = []
    monkeypatch.setattr(made.client, "eval", lambda script, count, *keys: revived.append(keys))
    made.fails(ResponseError)
    assert revived == [(KEY,)]
    made.redis.accepts = None
    made.turn()
    assert made.sent() == [(0, 1)]


@pytest.mark.parametrize(
    ("redis", "here", "oldest"), [(500, 900.0, 400_000), (900, 500.0, 400_000), (9, 9.0, 0)]
)
def test_only_what_is_too_old_by_both_clocks_is_trimmed(
    monkeypatch, redis: int, here: float, oldest: int
) -> None:
    monkeypatch.setattr(sender_module, "time", SimpleNamespace(monotonic=lambda: 1e6, time=lambda: here))
    made = Sending(stream_seconds=100.0)
    monkeypatch.setattr(made.client, "time", lambda: (redis, 0))
    made.put(1)
    made.turn()
    assert made.redis.calls[0] == ("xtrim", {"minid": oldest, "approximate": True})


def test_a_stream_over_its_cap_loses_its_oldest_entries(monkeypatch) -> None:
    made = Sending()
    monkeypatch.setattr(made.client, "memory_usage", lambda key: 2 << 20)
    monkeypatch.setattr(made.client, "xlen", lambda key: 1000)
    made.put(1)
    made.turn()
    assert made.redis.calls[-1] == ("xtrim", {"maxlen": 450, "approximate": True})


def test_a_user_who_may_not_measure_still_sends(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0, time=lambda: 0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(sender_module, "time", clock)
    made, asked = Sending(), []

    def denied(key: bytes) -> int:
        asked.append(key)
        raise NoPermissionError("no")

    monkeypatch.setattr(made.client, "memory_usage", denied)
    for number in range(3):
        made.put(number)
        made.turn()
        clock.now += 10
    assert [sequence for sequence, _ in made.sent()] == [0, 1, 2]
    assert asked == [KEY]
