"""A cluster and a set of Sentinels, of real servers."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from benchmarks.valkey_process import ValkeyProcess, free_port, server_binary
from retrieval_draft.errors import DatastoreError
from tests.support.stores import wait_until

SLOTS = 16384


def cluster_port() -> int:
    """A free port; the cluster's own is that plus 10,000, and is free too."""
    while True:
        port = free_port()
        with suppress(OSError, OverflowError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + 10_000))
            return port


class ValkeyCluster:
    """Masters that share the slots between them."""

    def __init__(self, folder: Path, masters: int = 3) -> None:
        self.nodes = [
            ValkeyProcess(
                folder / f"node-{number}",
                config={
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-node-timeout": "2000",
                    "cluster-require-full-coverage": "no",
                },
            )
            for number in range(masters)
        ]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def __enter__(self) -> ValkeyCluster:
        try:
            self._start()
        except BaseException:  # nobody calls __exit__ then
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for node in self.nodes:
            for trial in range(5):  # another process may take a port before the server does
                node.port = cluster_port()
                try:
                    node.start()
                    break
                except DatastoreError:
                    if trial == 4:
                        raise
        step = -(-SLOTS // len(self.nodes))
        for number, node in enumerate(self.nodes):
            client = node.client()
            client.execute_command(
                "CLUSTER", "ADDSLOTSRANGE", number * step, min(SLOTS, number * step + step) - 1
            )
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        wait_until(lambda: all(self._is_ok(node) for node in self.nodes), 30)

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.kill()

    def _is_ok(self, node: ValkeyProcess) -> bool:
        info = node.client().execute_command("CLUSTER", "INFO")
        text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
        known = int(text["cluster_known_nodes"]) == len(self.nodes)
        return text["cluster_state"] == "ok" and known and int(text["cluster_slots_assigned"]) == SLOTS


class SentinelSet:
    """A master, a replica, and three Sentinels that watch them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.master = ValkeyProcess(folder / "master")
        self.replica = ValkeyProcess(folder / "replica")
        self._ports = [free_port() for _ in range(3)]
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in self._ports) + "/mymaster"

    def kill_master(self) -> None:
        """Ends the first master as a crash would."""
        self.master.kill()

    def __enter__(self) -> SentinelSet:
        try:
            self._start()
        except BaseException:  # nobody calls __exit__ then
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.master.start()
        self.replica.start()
        self.replica.client().replicaof("127.0.0.1", self.master.port)
        wait_until(lambda: self.replica.client().info("replication")["master_link_status"] == "up")
        for port in self._ports:
            folder = self._folder / f"sentinel-{port}"
            folder.mkdir()
            (folder / "sentinel.conf").write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor mymaster 127.0.0.1 {self.master.port} 2\n"
                "sentinel down-after-milliseconds mymaster 1000\n"
                "sentinel failover-timeout mymaster 3000\n"
            )
            with (folder / "log").open("ab") as log:
                words = [server_binary(), str(folder / "sentinel.conf"), "--sentinel"]
                self._processes.append(subprocess.Popen(words, stdout=log, stderr=log))
        wait_until(lambda: all(self._sees_all(port) for port in self._ports), 30)

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.master.kill()
        self.replica.kill()

    def _sees_all(self, port: int) -> bool:
        with suppress(RedisError, OSError):
            with Redis(port=port, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
                state = client.sentinel_master("mymaster")
            return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2
        time.sleep(0.05)
        return False
