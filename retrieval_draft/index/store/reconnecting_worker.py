"""A connection of one background thread, made again whenever it fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisClusterException, RedisError, ResponseError

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.backoff import Backoff
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.health import Health

__all__ = ["FAILURES", "ReconnectingWorker"]

FAILURES = (RedisError, RedisClusterException, OSError, DatastoreError)
"""What a call to a store may raise that is down, slow, full or not ours to use."""

_log = logging.getLogger("retrieval_draft")


class ReconnectingWorker:
    """Connects, lets the thread do its work, and connects again when that fails.

    Args:
        connector: Makes clients.
        channel: "sending" or "receiving".
        block: Seconds that a reading call may block in Redis.
        health: Told of every success and failure.
        counts: To count in.
        stopped: Ends everything.
    """

    def __init__(
        self,
        connector: Connector,
        channel: str,
        block: float,
        health: Health,
        counts: StoreCounts,
        stopped: threading.Event,
    ) -> None:
        self._connector = connector
        self._channel = channel
        self._block = block
        self._health = health
        self._counts = counts
        self._stopped = stopped
        self._backoff = Backoff()

    def run(self, work: Callable[[Any], None], lost: Callable[[], None] = lambda: None) -> None:
        """Calls `work` with a client that has answered, until `stopped`.

        Args:
            work: Returns to be called again with the same client, raises when the connection fails.
            lost: Called after each failure.
        """
        while not self._stopped.is_set():
            client = None
            try:
                client = self._connector.client(self._block)
                client.ping()
                self._counts.connections += 1
                while not self._stopped.is_set():
                    work(client)
            except Exception as error:
                if not isinstance(error, FAILURES):  # a defect of ours must not end the thread
                    _log.warning("The shared store goes on after an error: %r", error, exc_info=error)
                self._counts.failures += 1
                if self._backoff.failures:  # the first may be no more than an old connection
                    self._health.failed(self._channel, error)
                lost()
            finally:
                if client is not None:
                    with suppress(*FAILURES):
                        client.close()
            if not self._stopped.is_set():
                self._backoff.wait(self._stopped)

    def worked(self) -> None:
        """The thread's own work succeeded: a server that answers a ping may still refuse that."""
        self._backoff.reset()
        self._health.worked(self._channel)


def server_run(client: Any, cluster: bool) -> str | None:
    """What changes when Redis restarts or another server takes over; None where it is not known."""
    if cluster:
        return None
    try:
        return str(client.info("server").get("run_id"))
    except ResponseError:  # not permitted
        return None
