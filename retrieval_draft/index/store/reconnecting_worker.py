"""The connection of one background thread, which reconnects after failures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.health import Health

__all__ = ["FAILURES", "ReconnectingWorker"]

FAILURES = (RedisError, RedisClusterException, OSError, DatastoreError)
"""Exceptions of calls to a store that is down, slow, full or denies access."""

_MIN_WAIT, _MAX_WAIT = 0.05, 2.0
"""Seconds between attempts, doubling at each failure, with jitter, as many servers lose a store at once."""

_MAX_DOUBLINGS = 16
"""redis-py computes 2 to the power of the failures, which overflows in a long outage."""

_log = logging.getLogger("retrieval_draft")


class ReconnectingWorker:
    """Connects, runs the thread's work, and reconnects after a failure.

    Args:
        connector: Makes clients.
        channel: "sending" or "receiving".
        block: Seconds that a reading call may block in Redis.
        health: Records every success and failure.
        counts: Counters to add to.
        stopped: Ends `run` when set.
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
        self._backoff = EqualJitterBackoff(cap=_MAX_WAIT, base=_MIN_WAIT)
        self._failures = 0

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
                if not isinstance(error, FAILURES):  # a bug must not end the thread
                    _log.warning("The shared store goes on after an error: %r", error, exc_info=error)
                self._counts.failures += 1
                if self._failures:  # the first may only be an old connection
                    self._health.failed(self._channel, error)
                lost()
            finally:
                if client is not None:
                    with suppress(*FAILURES):
                        client.close()
            if not self._stopped.is_set():
                self._failures += 1
                if self._failures > 1:
                    self._stopped.wait(self._backoff.compute(min(self._failures, _MAX_DOUBLINGS)))

    def worked(self) -> None:
        """Records that the thread's own work succeeded: a server that answers a ping may still refuse it."""
        self._failures = 0
        self._health.worked(self._channel)


def server_run(client: Any, cluster: bool) -> str | None:
    """Id that changes when Redis restarts or another server takes over; None where it is not known."""
    if cluster:
        return None
    try:
        return str(client.info("server").get("run_id"))
    except ResponseError:  # not permitted
        return None
