"""One server's copy of the log: every entry once, whatever is read twice, torn or in another order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from retrieval_draft.index.store import log_replica, replay_buffer
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.log_replica import FIELD, LogReplica, stream_id

VOCABULARY = 100
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
CODEC = EntryCodec("fingerprint:tenant", None, 1 << 15)


def payload(server: bytes, sequence: int, tokens: list[int] | None = None) -> bytes:
    """An entry; without tokens two that tell it from the others."""
    named = [server[0] - 96, sequence + 10] if tokens is None else tokens
    return CODEC.encode(server, sequence, np.array(named, np.int32))


def item(at: int, server: bytes, sequence: int, tokens: list[int] | None = None) -> list[Any]:
    """The reply of redis-py for an entry with the id ``at-0``."""
    return [b"%d-0" % at, [FIELD, payload(server, sequence, tokens)]]


def replica(**options: Any) -> LogReplica:
    return LogReplica(VOCABULARY, CODEC, StoreConfig("redis://there", **options), StoreCounts())


def texts(made: LogReplica) -> Counter[tuple[int, ...]]:
    """Every run that can be looked up, and how often it is there."""
    found: Counter[tuple[int, ...]] = Counter()
    for segment in made.segments:
        run: list[int] = []
        for token in segment.texts(VOCABULARY).tolist():
            if token == VOCABULARY:
                found[tuple(run)] += 1
                run = []
            else:
                run.append(token)
    return found


def counts(made: LogReplica) -> StoreCounts:
    return made._counts


def test_each_entry_is_in_once_whatever_order_and_how_often_it_is_read() -> None:
    made = replica()
    made.take("0", [item(1, A, 2), item(2, A, 0), item(3, B, 0)])
    made.take("0", [item(2, A, 0), item(3, B, 0), item(4, A, 1), item(5, A, 2)])
    made.take("1", [item(1, B, 0)])
    made.publish()
    assert texts(made) == {(1, 10): 1, (1, 11): 1, (1, 12): 1, (2, 10): 1}
    assert (made.entries, counts(made).ingested, counts(made).ingested_tokens) == (4, 4, 8)
    assert counts(made).duplicates == 4


def test_a_gap_is_open_until_its_entry_comes() -> None:
    made = replica()
    made.take("0", [item(1, A, 0), item(2, A, 3)])
    assert [made.seen(A, sequence) for sequence in range(5)] == [True, False, False, True, False]
    assert not made.seen(B, 0)
    made.take("0", [item(3, A, 1)])
    assert made.writers()[A].bounds == [0, 1, 3, 3]


def test_equal_entries_give_equal_digests_in_any_order() -> None:
    entries = [item(1, A, 0), item(2, A, 1), item(3, B, 0)]
    one, other, less, altered = replica(), replica(), replica(), replica()
    one.take("0", entries)
    for number, (_, fields) in enumerate(reversed(entries)):
        other.take("2", [[b"%d-0" % number, fields], [b"%d-1" % number, fields]])
    less.take("0", entries[:2])
    altered.take("0", [*entries[:2], item(3, B, 0, [2, 11])])
    assert one.digest == other.digest
    assert len({one.digest, less.digest, altered.digest, replica().digest}) == 4


def test_what_is_read_again_is_not_counted_again() -> None:
    made, entries = replica(), [item(1, A, 0), [b"2-0", [FIELD, b"torn"]], item(3, A, 1, [VOCABULARY])]
    made.take("0", entries)
    made.reread("0", from_start=False)
    made.take("0", entries)
    assert counts(made).received == 3
    assert counts(made).dropped == {"malformed": 1, "vocabulary": 1}
    assert counts(made).rereads == 1


def test_another_stream_of_the_same_name_counts_from_its_start() -> None:
    made = replica()
    made.take("0", [item(9, A, 0)])
    made.reread("0", from_start=True)
    made.take("0", [item(1, A, 1), [b"2-0", [FIELD, b"torn"]]])
    assert counts(made).received == 3
    assert counts(made).dropped == {"malformed": 1}
    assert made.entries == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([FIELD, payload(A, 1)[:-3]], "malformed"),
        ([FIELD, payload(A, 1) + b"\x00"], "malformed"),
        ([FIELD, b""], "malformed"),
        ([b"x", payload(A, 1)], "malformed"),
        ([FIELD, payload(A, 1), b"x", b"y"], "malformed"),
        (None, "malformed"),
        (1 << 30, "length"),
        ([FIELD, EntryCodec("other:tenant", None, 64).encode(A, 1, np.ones(2, np.int32))], "namespace"),
        ([FIELD, payload(A, 1, [5, VOCABULARY])], "vocabulary"),
    ],
    ids=["torn", "longer", "empty", "other field", "two fields", "deleted", "too long", "namespace", "id"],
)
def test_what_is_no_entry_of_ours_is_dropped_and_passed_by(fields: Any, reason: str) -> None:
    made = replica()
    made.take("0", [item(1, A, 0), [b"2-0", fields], item(3, A, 2)])
    made.take("0", [[b"4-0", fields]])
    assert counts(made).dropped == {reason: 2}
    assert (made.entries, made.positions) == (2, {"0": b"4-0"})
    assert not made.seen(A, 1)


def test_fields_of_a_cluster_client_are_read_too() -> None:
    made = replica()
    made.take("0", [[b"1-0", {FIELD: payload(A, 0)}], [b"2-0", {b"x": b"y", FIELD: payload(A, 1)}]])
    assert (made.entries, counts(made).dropped) == (1, {"malformed": 1})


def test_a_server_that_adds_too_much_is_cut_off_and_no_other() -> None:
    made = replica(tokens_per_second=64)  # four seconds' worth at once: 256
    made.take("0", [item(1, A, 0, [1] * 200), item(2, A, 1, [2] * 100), item(3, B, 0, [3] * 200)])
    assert (made.entries, counts(made).dropped) == (2, {"rate": 1})
    made.take("0", [item(4, A, 1, [2] * 100)])  # sent again: it stays out, on this server as on others
    assert (made.entries, counts(made).duplicates) == (2, 1)
    made.take("0", [item(4000, A, 2, [4] * 100)])
    assert made.entries == 3


def test_there_is_room_for_so_many_servers_until_old_ones_are_silent(monkeypatch) -> None:
    monkeypatch.setattr(log_replica, "MAX_SERVERS", 2)
    made = replica(stream_seconds=1.0)
    made.take("0", [item(1000, A, 0), item(1001, B, 0), item(1002, C, 0)])
    assert (made.entries, counts(made).dropped) == (2, {"servers": 1})
    made.take("0", [item(60_000, C, 1)])
    assert made.entries == 3
    assert set(made.writers()) == {C}


def test_nothing_can_be_looked_up_before_it_is_published() -> None:
    made = replica()
    made.take("0", [item(1, A, 0)])
    assert (texts(made), made.waiting_tokens) == ({}, 3)  # with what ends the run
    made.publish()
    assert (texts(made), made.waiting_tokens) == ({(1, 10): 1}, 0)
    before = made.segments
    made.publish()
    assert made.segments is before


def test_many_tokens_wait_for_the_thread_that_sorts_and_later_ones_stay_behind(monkeypatch) -> None:
    monkeypatch.setattr(log_replica, "SMALL", 50)
    made = replica()
    made.take("0", [item(1, A, 0, [1] * 60)])
    made.publish()
    made.take("0", [item(2, A, 1, [2, 3])])
    made.publish()
    assert (made.unsorted, texts(made)) == (2, {})
    assert made.sort()
    assert texts(made) == {(1,) * 60: 1}
    assert made.sort()
    assert texts(made) == {(1,) * 60: 1, (2, 3): 1}
    assert not made.sort()


def test_many_runs_at_once_become_several_segments(monkeypatch) -> None:
    monkeypatch.setattr(log_replica, "SMALL", 1 << 20)
    made = replica()
    made.batch_tokens = 10
    runs = [[number + 1] * 9 for number in range(8)]
    made.take("0", [item(number + 1, A, number, run) for number, run in enumerate(runs)])
    added: list[Any] = []
    monkeypatch.setattr(made.pile, "add", added.append)
    made.publish()
    assert [segment.texts(VOCABULARY).tolist().count(VOCABULARY) for segment in added] == [2, 2, 2, 2]
    joined = [token for segment in added for token in segment.texts(VOCABULARY).tolist()]
    assert joined == [token for run in runs for token in [*run, VOCABULARY]]


def test_a_restored_copy_goes_on_where_the_snapshot_stood() -> None:
    made, other = replica(), replica()
    made.take("0", [item(5, A, 0), item(6, A, 2)])
    segments, state, _ = made.snapshot("fingerprint:tenant")
    assert state.positions == {"0": "6-0"}
    other.restore(segments, state)
    assert (other.entries, other.digest, other.positions) == (2, made.digest, {"0": b"6-0"})
    for each in (made, other):
        each.take("0", [item(5, A, 0), item(6, A, 2), item(7, A, 1)])
        each.publish()
    assert texts(other) == texts(made) == {(1, 10): 1, (1, 11): 1, (1, 12): 1}
    assert other.digest == made.digest


def test_after_a_crash_only_what_is_not_in_the_log_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(replay_buffer, "_PATIENCE", (0.0, 0.0))
    made = replica()
    made.take("0", [item(1, A, 0), item(2, A, 1), item(3, B, 0)])
    made.recent.mark_lost(0.0)
    made.take("0", [item(1, A, 0), item(4, B, 0)])
    made.recent.caught_up()
    assert [CODEC.decode(each).sequence for each in made.recent.missing()] == [1]


@pytest.mark.parametrize(
    ("name", "numbers"), [(b"1763972285000-2", (1763972285000, 2)), (b"5", (5, 0)), (b"10-11", (10, 11))]
)
def test_ids_are_two_numbers(name: bytes, numbers: tuple[int, int]) -> None:
    assert stream_id(name) == numbers
