"""Rows and replies of other servers: sent within a share of the bytes, learned once, in snapshots."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.adjacency import AdjacencyMatrix, AdjacencySource
from retrieval_draft.index.matrix_rows import MatrixRows
from retrieval_draft.index.source import NodeLogits, TokenArray
from retrieval_draft.index.store import learned as learned_module
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import Entry, EntryCodec
from retrieval_draft.index.store.learned import other_id
from retrieval_draft.index.store.learned_entry import pack_calibration, pack_learned, unpack_learned
from retrieval_draft.index.store.log_replica import FIELD, LogReplica
from retrieval_draft.index.store.outbox import Run
from retrieval_draft.index.store.row_outbox import ROWS, RowOutbox
from retrieval_draft.index.store.run_encoder import RunEncoder
from tests.support.tokens import ids

VOCABULARY = 100
A, B = b"a" * 16, b"b" * 16
CODEC = EntryCodec(f"{'f' * 32}:tenant", None, 1 << 15)
NOTHING = np.empty(0, np.int32)


def replica() -> LogReplica:
    return LogReplica(VOCABULARY, CODEC, StoreConfig("redis://there"), StoreCounts())


def predictions(*context: int, times: int = 1, tokens: tuple[int, ...] = (9, 8)) -> NodeLogits:
    contexts = np.full((times, 4), -1, np.int32)
    contexts[:, 4 - len(context) :] = context
    probs = np.array([0.6, 0.3], np.float32)[None].repeat(times, 0)
    return NodeLogits(contexts, ids(*tokens)[None].repeat(times, 0), probs)


def encoder(server: bytes = A, mirror: LogReplica | None = None, share: float = 0.5) -> RunEncoder:
    return RunEncoder(server, mirror or replica(), CODEC, VOCABULARY, 1000, share)


def entries_of(made: RunEncoder, taken: list[Run]) -> list[bytes]:
    return [*made.encode(taken), *made.rows(taken)]


def take(made: LogReplica, *entries: bytes, at: int = 1) -> None:
    made.take("0", [[b"%d-%d" % (at, number), [FIELD, entry]] for number, entry in enumerate(entries)])
    made.learned.work()


def versions(entries: list[bytes]) -> list[int]:
    return [msgspec.msgpack.decode(entry)[0] for entry in entries]


def learned_matrix(made: LogReplica) -> AdjacencyMatrix:
    matrix = AdjacencyMatrix(rows=4096)
    made.learned.attach(matrix)
    return matrix


def reply(size: int = 200) -> TokenArray:
    return (np.arange(size, dtype=np.int32) * 7 + 11) % 89


def test_rows_seen_often_enough_come_with_the_text_once() -> None:
    made, reader = encoder(), replica()
    matrix = learned_matrix(reader)
    entries = entries_of(made, [Run(NOTHING, reply(), [predictions(1, 2, times=3), predictions(5)])])
    assert versions(entries) == [1, 2], "no text waits for rows"
    take(reader, *entries)
    tokens, probs, visits = matrix.row(ids(1, 2))
    assert (tokens.tolist(), visits) == ([9, 8], 3)
    np.testing.assert_allclose(probs, [0.6, 0.3], rtol=0.0225)
    assert matrix.row(ids(5))[0].tolist() != [9, 8], "seen once"
    take(reader, *entries, at=2)
    assert matrix.row(ids(1, 2))[2] == 3, "read twice"
    again = entries_of(made, [Run(NOTHING, reply()[::-1].copy(), [predictions(5)])])
    take(reader, *again, at=3)
    assert matrix.row(ids(1, 2))[2] == 3
    assert unpack_learned(msgspec.msgpack.decode(again[-1])[5], VOCABULARY).rows.visits.tolist() == [2]


def test_rows_take_no_more_than_their_share() -> None:
    outbox = RowOutbox(VOCABULARY, 0.5)
    for token in range(90):
        outbox.learn([predictions(token, 3, times=2)])
    sent = 0
    for number in range(1, 41):
        rows = outbox.take(400)
        if rows is not None:
            sent += len(pack_learned(rows, (), VOCABULARY)) + 100  # and the entry around them
        assert sent <= 200 * number
    assert sent > 0
    assert RowOutbox(VOCABULARY, 0.0).take(1 << 20) is None


def test_a_share_of_nothing_sends_texts_alone() -> None:
    made = encoder(share=0.0)
    assert versions(entries_of(made, [Run(reply(), reply(), [predictions(1, times=4)])])) == [1]
    assert made.nbytes == 0


def test_others_replies_are_learned_and_prompts_are_not() -> None:
    made, reader = encoder(), replica()
    matrix = learned_matrix(reader)
    entries = entries_of(made, [Run(ids(1, 2, 3, 4, 5, 6, 7), ids(8, 9, 10))])
    assert versions(entries) == [2, 1]
    take(reader, *entries)
    assert matrix.row(ids(7))[0].tolist() == [8]
    assert matrix.row(ids(4, 5, 6, 7))[0].tolist() == [8]
    assert matrix.row(ids(9))[0].tolist() == [10]
    for token in (1, 2, 3, 4, 5, 6):
        assert matrix.row(ids(token))[2] == 0
    counted, _ = reader.learned.table.frequent()
    assert counted.tolist() == [8, 9, 10]


def test_what_this_server_sent_its_matrices_know() -> None:
    made, reader = encoder(), replica()
    reader.learned.own = (A, other_id(A))
    matrix = learned_matrix(reader)
    take(reader, *entries_of(made, [Run(NOTHING, reply(), [predictions(1, 2, times=3)])]))
    assert matrix.filled == 0
    assert reader.learned.table.filled == 2
    assert (reader.learned_entries, reader.entries, reader._counts.ingested) == (1, 1, 1)


def test_a_matrix_that_comes_later_learns_what_came_before() -> None:
    made, reader = encoder(), replica()
    learned_matrix(reader)
    take(reader, *entries_of(made, [Run(NOTHING, reply(), [predictions(1, 2, times=3)])]))
    late = learned_matrix(reader)
    reader.learned.work()
    assert late.row(ids(1, 2))[2] == 3
    assert late.row(reply()[3:7])[0].tolist() == [int(reply()[7])]


def test_replies_are_learned_at_a_bounded_rate_the_newest_first_to_stay(monkeypatch: Any) -> None:
    monkeypatch.setattr(learned_module, "RECENT_TOKENS", 500)
    reader = replica()
    matrix = learned_matrix(reader)
    made = encoder()
    entries = [entry for number in range(9) for entry in entries_of(made, [Run(NOTHING, reply() + number)])]
    reader.take("0", [[b"1-%d" % number, [FIELD, entry]] for number, entry in enumerate(entries)])
    assert reader.learned._tokens <= 500
    reader.learned._rate.room = 0.0
    reader.learned._rate.restart(1e12)
    reader.learned.work()
    assert matrix.filled == 0
    assert reader.learned.nbytes >= reader.learned.table.nbytes


@pytest.mark.parametrize(
    "packed",
    [
        b"\x00",
        b"\x09\x00\x00",
        b"\x01\xff\xff",
        b"\x01\x01\x00" + bytes(5),
        b"\x01\x00\x00" + bytes(20),
        b"\x02\x01\x00abc",
    ],
)
def test_content_that_is_none_is_counted_and_the_next_comes_in(packed: bytes) -> None:
    reader = replica()
    with pytest.raises(DatastoreError):
        unpack_learned(packed, VOCABULARY)
    take(reader, CODEC.encode_learned(other_id(A), 0, packed), CODEC.encode(A, 0, ids(1, 2)))
    assert reader._counts.dropped == {"malformed": 1}
    assert (reader.entries, reader.learned_entries) == (1, 0)


def test_ids_outside_of_the_vocabulary_are_neither_sent_nor_read() -> None:
    made = encoder()
    outside = [predictions(1, 2, times=3, tokens=(9, VOCABULARY)), predictions(VOCABULARY, 4, times=3)]
    assert versions(entries_of(made, [Run(NOTHING, reply(), outside)])) == [1]
    rows = MatrixRows(
        np.array([5], np.uint64), ids(2), ids(0), ids(VOCABULARY)[None], np.ones((1, 1), np.float32)
    )
    with pytest.raises(DatastoreError):
        unpack_learned(pack_learned(rows, (), VOCABULARY), VOCABULARY)


def test_a_flood_of_rows_is_cut_off_like_one_of_texts() -> None:
    reader = LogReplica(VOCABULARY, CODEC, StoreConfig("redis://there", tokens_per_second=64), StoreCounts())
    content = pack_calibration(bytes(500))
    take(reader, *[CODEC.encode_learned(other_id(A), number, content) for number in range(9)])
    assert reader.learned_entries == 2
    assert reader._counts.dropped["rate"] == 7


def test_a_snapshot_has_rows_and_counts_and_a_torn_one_costs_them_only() -> None:
    made, reader = encoder(), replica()
    take(reader, *entries_of(made, [Run(NOTHING, reply(), [predictions(1, 2, times=3)])]))
    reader.publish()
    segments, state, packed = reader.snapshot("n:t")
    other = replica()
    matrix = learned_matrix(other)
    other.restore(segments, state)
    other.learned.restore(packed, segments)
    other.learned.work()
    assert matrix.row(ids(1, 2))[2] == 3
    assert matrix.row(reply()[3:7])[0].tolist() == [int(reply()[7])]
    assert len(other.learned.table.frequent()[0]) == len(set(reply().tolist()))
    torn = replica()
    matrix = learned_matrix(torn)
    torn.restore(segments, state)
    with pytest.raises(DatastoreError):
        torn.learned.restore(packed[:-9], segments)
    torn.learned.work()
    assert matrix.row(reply()[3:7])[0].tolist() == [int(reply()[7])]


def read_as_version_1(payload: bytes) -> str:
    """The rule of the release before, commit 1c5ad1c: decode, then version, namespace and sizes."""
    entry = msgspec.msgpack.decode(payload, type=Entry)
    if entry.version != 1:
        return "version"
    return "kept" if len(entry.tokens) % 4 == 0 and len(entry.server) == 16 else "malformed"


def test_a_server_of_the_release_before_drops_what_it_does_not_know() -> None:
    entries = entries_of(encoder(), [Run(reply(), reply(), [predictions(1, 2, times=3)])])
    assert [read_as_version_1(entry) for entry in entries] == ["version", "kept", "version"]
    sent = [msgspec.msgpack.decode(entry) for entry in entries]
    assert sent[0][2] == sent[2][2] != sent[1][2], "no gaps among the numbers that it knows"
    assert [each[3] for each in sent] == [0, 0, 1]


def test_entries_of_the_release_before_are_read() -> None:
    reader = replica()
    matrix = learned_matrix(reader)
    run = reply().astype("<u4").tobytes()
    take(reader, msgspec.msgpack.encode([1, f"{'f' * 32}:tenant", B, 0, 1763972285000, run, b""]))
    assert reader.entries == 1
    assert matrix.row(reply()[3:7])[0].tolist() == [int(reply()[7])]


def test_a_source_tells_its_store_what_requests_learned() -> None:
    class Store:
        learned = replica().learned

        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def observe(self, prompt: TokenArray) -> None:
            self.asked.append(prompt.tolist())

    store: Any = Store()
    source = AdjacencySource(rows=64, shared=store)
    source.open(ids(1, 2)).observe(ids(3))
    assert store.asked == [[1, 2]]


def test_rows_take_turns() -> None:
    outbox = RowOutbox(VOCABULARY, 0.5)
    sent: set[int] = set()
    for _ in range(60):
        outbox.learn([predictions(token, times=2) for token in range(20)])
        rows = outbox.take(320)
        if rows is not None:
            sent |= set(rows.keys.tolist())
    assert len(sent) == 20


def test_a_turn_reads_no_more_slots_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = RowOutbox(VOCABULARY, 0.5)
    for token in range(VOCABULARY):
        outbox.learn([predictions(token, 3, times=2)])
    pending: Any = outbox._pending
    waiting = len(pending.rows(2))
    read: list[int] = []
    rows_of = pending.rows
    monkeypatch.setattr(
        pending, "rows", lambda least, begin, end: read.append(end - begin) or rows_of(least, begin, end)
    )
    first = outbox.take(320)
    assert first is not None
    assert sum(read) <= ROWS // 2
    sent = [first.keys]
    for _ in range(4 * waiting):
        rows = outbox.take(320)
        sent += [] if rows is None else [rows.keys]
    keys = np.concatenate(sent)
    assert len(keys) == len(set(keys.tolist())) == waiting, "each once"
    read.clear()
    assert outbox.take(320) is None
    assert sum(read) <= 2 * ROWS


def test_a_calibration_of_a_snapshot_that_is_too_long_is_left_out() -> None:
    made = replica().learned
    rows, _ = msgspec.msgpack.decode(made.packed())
    made.restore(msgspec.msgpack.encode((rows, bytes(learned_module.MOST_CALIBRATION + 1))), ())
    assert made.calibration == b""
    made.restore(msgspec.msgpack.encode((rows, b"short")), ())
    assert made.calibration == b"short"
