"""Makes clients of redis-py for a store."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from retrieval_draft.index.store.embedded import EmbeddedServer
from retrieval_draft.index.store.url import StoreURL

__all__ = ["Connector"]

_READ_SIZE = 1 << 17

# redis-py would log unreachable nodes of a cluster at every attempt; our line is logged once.
logging.getLogger("redis.cluster").addHandler(logging.NullHandler())


class Connector:
    """Factory of clients of a store. Clients do not retry by themselves: callers do.

    Args:
        url: Of the store.
        timeout: Seconds to wait for a connection, and for an answer.
    """

    def __init__(self, url: StoreURL, timeout: float = 2.0) -> None:
        self._url = url
        self._timeout = timeout
        self._lock = threading.Lock()
        self._embedded: EmbeddedServer | None = None

    @property
    def is_cluster(self) -> bool:
        """True if keys are spread over several servers."""
        return self._url.kind == "cluster"

    def client(self, block: float = 0.0) -> Any:
        """A client with connections of its own.

        Args:
            block: Seconds that its calls may block in Redis, on top of the timeout.

        Raises:
            DatastoreError: An embedded server cannot be started.
            redis.RedisError: A cluster cannot be reached; for other servers the first call raises that.
        """
        url = self._url
        options: dict[str, Any] = {
            "username": url.username,
            "password": url.password,
            "socket_timeout": self._timeout + block,
            "socket_connect_timeout": self._timeout,
            "client_name": "retrieval_draft",
            "protocol": 2,
        }
        if url.tls is not None:
            options |= {"ssl": True, **url.tls}
        no_retry = Retry(NoBackoff(), 0)
        single = options | {"retry": no_retry, "socket_read_size": _READ_SIZE, "db": url.database}
        if url.kind in ("unix", "embedded"):
            path = url.path if url.kind == "unix" else self._ensure()
            return Redis(unix_socket_path=str(path), **single)
        single["socket_keepalive"] = True
        if url.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            return RedisCluster(startup_nodes=nodes, retry=no_retry, **options)
        if url.kind == "sentinel":
            tls = {} if url.tls is None else {"ssl": True, **url.tls}
            asking = {
                "socket_timeout": self._timeout,
                "socket_connect_timeout": self._timeout,
                "retry": no_retry,
            }
            sentinel = Sentinel(list(url.hosts), sentinel_kwargs=asking | tls | dict(url.sentinel), **single)
            return sentinel.master_for(url.service)
        ((host, port),) = url.hosts
        return Redis(host=host, port=port, **single)

    def __enter__(self) -> Connector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops an embedded server if this process owns it."""
        with self._lock:
            if self._embedded is not None:
                self._embedded.close()
                self._embedded = None

    def _ensure(self) -> Path:
        with self._lock:
            if self._embedded is None:
                assert self._url.path is not None
                self._embedded = EmbeddedServer(self._url.path, password=self._url.password)
            return self._embedded.ensure()
