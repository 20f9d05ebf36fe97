"""Invalid entries in a store: none may crash a server, or be drafted from."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.store_worker import FINGERPRINT, numbered_run, probe_text
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.entry import ID_BYTES, LEARNED_VERSION, EntryCodec
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.learned_entry import pack_learned
from retrieval_draft.index.store.log_replica import FIELD
from retrieval_draft.index.store.store import SharedStore

__all__ = ["measure_fuzz"]

_VOCABULARY = 32000
_CONTEXT = np.array([[1, 2, 3, 4]], np.int32)
_KEY = "the tenant's key"
_GOOD = 200
_SECONDS = 60.0


def measure_fuzz(
    folder: Path, *, fuzzed: int = 10_000, foreign: int = 1_000, seed: int = 0
) -> dict[str, Any]:
    """Writes bad entries, with good ones between them, into the streams of a server with a key.

    Args:
        folder: For the store's data.
        fuzzed: Random bytes, random MessagePack, valid entries, of texts and of rows, with a bit flipped,
            truncated or with one field replaced, and signed ones with rows that are none.
        foreign: Valid entries of another tenant.
        seed: Of all random choices.

    Returns:
        Numbers of entries received, dropped by reason and added, and of texts wrongly added or drafted from.
    """
    chance = random.Random(seed)
    namespace = f"{FINGERPRINT}:default"
    mine, other = EntryCodec(namespace, _KEY, 1 << 15), EntryCodec(f"{FINGERPRINT}:other", _KEY, 1 << 15)
    good_server, bad_server = chance.randbytes(ID_BYTES), chance.randbytes(ID_BYTES)
    fields: list[dict[Any, Any]] = [
        {FIELD: _fuzzed(chance, mine, bad_server, each)} for each in range(fuzzed)
    ]
    for number in range(0, fuzzed, 50):  # items that are no entries at all
        fields[number] = {b"other": b"field", FIELD: b"x"} if number % 100 else {b"text": b"hello"}
    probes = [probe_text(number, _VOCABULARY) for number in range(foreign)]
    fields += [{FIELD: other.encode(bad_server, number, run)} for number, run in enumerate(probes)]
    fields += [
        {FIELD: mine.encode(good_server, number, numbered_run(1, number, _VOCABULARY))}
        for number in range(_GOOD)
    ]
    chance.shuffle(fields)
    with ValkeyProcess(folder / "fuzz", append_only=False) as server:
        client: Any = server.client()
        with SharedStore(StoreConfig(server.url, key=_KEY), FINGERPRINT, _VOCABULARY) as store:
            matrix = AdjacencyMatrix(1 << 12)
            store.learned.attach(matrix)
            for number, each in enumerate(fields):
                client.xadd(stream_key(namespace, str(number % SHARDS)), each)
            end = time.monotonic() + _SECONDS
            while store.counts.received < len(fields) and time.monotonic() < end:
                time.sleep(0.01)
            store.mirror.publish()
            for table in (matrix, store.learned.table):
                table.rows().check(_VOCABULARY)
            found = Counter(tuple(text) for text in _texts(store))
            expected = Counter(
                tuple(numbered_run(1, number, _VOCABULARY).tolist()) for number in range(_GOOD)
            )
            source = SharedSource(store)
            drafts = [source.open(run[:40]).propose(8).tokens.tolist() for run in probes]
            drafted = sum(int(run[40]) in draft for run, draft in zip(probes, drafts, strict=True))
            status = store.status()
        client.close()
    return {
        "written": len(fields),
        "received": status["received"],
        "dropped": status["dropped"],
        "ingested": status["ingested"],
        "uncounted": status["received"]
        - status["ingested"]
        - status["learned_entries"]
        - status["duplicates"]
        - sum(status["dropped"].values()),
        "bad_texts": sum((found - expected).values()),
        "lost_texts": sum((expected - found).values()),
        "foreign_drafts": drafted,
        "state": status["state"],
    }


def _fuzzed(chance: random.Random, codec: EntryCodec, server: bytes, number: int) -> bytes:
    kind = number % 7
    if kind == 0:
        return chance.randbytes(chance.randrange(200))
    if kind == 1:
        return msgspec.msgpack.encode([_thing(chance, 3) for _ in range(chance.randrange(9))])
    if kind == 5:  # signed, and made to look like rows
        head = chance.choice([b"", b"\x01\x00\x00", b"\x01\x01\x00", b"\x01\x00\x00\x02\x01\x00\x00\x00\x08"])
        return codec.encode_learned(server, number, head + chance.randbytes(chance.randrange(1, 60)))
    true = bytearray(codec.encode(server, number, probe_text(10**7 + number, _VOCABULARY, 20)))
    if chance.random() < 0.5:
        rows = AdjacencyMatrix(16)
        rows.learn(NodeLogits(_CONTEXT, _CONTEXT + 5, np.full((1, 4), 0.25, np.float32)))
        content = bytearray(pack_learned(rows.rows(), [(number, 3)], _VOCABULARY))
        if kind == 6:
            content[chance.randrange(len(content))] = chance.randrange(256)
        true = bytearray(codec.encode_learned(server, number, bytes(content)))
    if kind == 6:
        return bytes(true) if true[1] == LEARNED_VERSION else bytes(true[:-1])
    if kind == 2:
        bit = chance.randrange(8 * len(true))
        true[bit // 8] ^= 1 << bit % 8
        return bytes(true)
    if kind == 3:
        return bytes(true[: chance.randrange(len(true))])
    entry, index = msgspec.msgpack.decode(bytes(true)), chance.randrange(7)
    value = _thing(chance, 2)
    entry[index] = None if value == entry[index] else value
    return msgspec.msgpack.encode(entry)


def _thing(chance: random.Random, depth: int) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: chance.randrange(-(2**63), 2**64),
        lambda: chance.randrange(-3, 3),
        chance.random,
        lambda: None,
        lambda: chance.randbytes(chance.randrange(40)),
        lambda: "x" * chance.randrange(40),
        lambda: [_thing(chance, depth - 1) for _ in range(chance.randrange(4))] if depth else [],
        lambda: {"k": _thing(chance, depth - 1)} if depth else {},
    ]
    return chance.choice(makers)()


def _texts(store: SharedStore) -> Iterator[list[int]]:
    for segment in store.segments:
        tokens = segment.tokens.astype(np.int64)
        for begin in segment.documents.tolist():
            length = int(np.argmax(tokens[begin:] == segment.separator))
            yield tokens[begin : begin + length].tolist()
