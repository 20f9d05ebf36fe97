"""Snapshots of a mirror: written by one server at a time, restored at start."""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import suppress

from redis.exceptions import LockError

from retrieval_draft.errors import DatastoreError, RetrievalDraftError
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.keys import lock_key
from retrieval_draft.index.store.log_replica import LogReplica
from retrieval_draft.index.store.reconnecting_worker import FAILURES
from retrieval_draft.index.store.snapshots import SnapshotInfo, SnapshotPlace

__all__ = ["Snapshotter"]

_LOCK_SECONDS = 120.0
"""Seconds for which a server that dies while it writes delays the others. If writing takes longer, two
servers write, which does no harm: each snapshot has its own name."""

_log = logging.getLogger("retrieval_draft")


class Snapshotter:
    """Takes part in the election of the server that writes the next snapshot.

    Args:
        connector: To Redis, which holds the lock.
        mirror: The mirror to write.
        config: The storage and the interval.
        namespace: Of the log.
        vocabulary: Number of token ids.
        counts: Counters to add to.
        stopped: Ends the thread when set.
    """

    def __init__(
        self,
        connector: Connector,
        mirror: LogReplica,
        config: StoreConfig,
        namespace: str,
        vocabulary: int,
        counts: StoreCounts,
        stopped: threading.Event,
    ) -> None:
        self._connector = connector
        self._mirror = mirror
        self._namespace = namespace
        self._seconds = config.snapshot_seconds
        self._counts = counts
        self._stopped = stopped
        self._failing = False
        self._wrote = float("-inf")
        self._location: SnapshotPlace | None = None
        if config.snapshots is not None:
            fingerprint = namespace.partition(":")[0]
            self._location = SnapshotPlace(config.snapshots, namespace, fingerprint, vocabulary)

    def restore(self) -> None:
        """Restores the mirror from the newest readable snapshot, if there is one."""
        if self._location is None:
            return
        try:
            found = self._location.newest()
        except (OSError, RetrievalDraftError) as error:
            self._fail("read", error)
            return
        if found is not None:
            self._mirror.restore(found.segments, found.state)
            try:
                self._mirror.learned.restore(found.learned, found.segments)
            except RetrievalDraftError as error:
                self._fail("read in full", error)

    def write(self) -> SnapshotInfo:
        """Writes one now, and removes those that two newer ones replace.

        Raises:
            DatastoreError: No storage is configured, or it cannot be written.
        """
        if self._location is None:
            raise DatastoreError(
                "There is no location for snapshots.", "Name a folder or a URL: snapshots= or --snapshots."
            )
        segments, state, learned = self._mirror.snapshot(self._namespace)
        info = self._location.write(segments, state, learned)
        self._counts.snapshots += 1
        self._wrote = time.monotonic()
        with suppress(DatastoreError):  # the next snapshot tries again
            self._location.prune()
        return info

    def run(self, begun: threading.Event) -> None:
        """Runs the thread: restores, and then writes at intervals when no other server does.

        Args:
            begun: Set once the mirror is restored.
        """
        try:
            if not self._mirror.entries:
                self.restore()
        finally:
            begun.set()
        if self._location is None:
            return
        while not self._stopped.wait(self._wait()):
            try:
                if self._due():
                    self._write_if_elected()
                self._failing = False
            except (*FAILURES, RetrievalDraftError) as error:
                self._fail("written", error)

    def _wait(self) -> float:
        return min(60.0, self._seconds / 4) * random.uniform(0.5, 1.0)

    def _due(self) -> bool:
        """True if the newest snapshot is old enough, and there is something new to write."""
        assert self._location is not None
        listed = self._location.listing()
        if not listed:
            return self._mirror.entries > 0
        newest = listed[0]
        age = time.time() - newest.created / 1000
        # The age of one from the future is unknown: then our own clock decides.
        is_old = age >= self._seconds or age < -self._seconds
        rested = time.monotonic() - self._wrote >= self._seconds
        return bool(is_old and rested and self._mirror.entries > newest.entries)

    def _write_if_elected(self) -> None:
        client = self._connector.client()
        try:
            lock = client.lock(lock_key(self._namespace), timeout=_LOCK_SECONDS, thread_local=False)
            if not lock.acquire(blocking=False):
                return
            try:
                if self._due():  # the last holder of the lock may just have written it
                    self.write()
            finally:
                with suppress(LockError, *FAILURES):
                    lock.release()
        finally:
            with suppress(*FAILURES):
                client.close()

    def _fail(self, what: str, error: Exception) -> None:
        self._counts.snapshot_failures += 1
        if not self._failing:
            _log.warning("A snapshot of the shared store could not be %s for now: %s", what, error)
        self._failing = True
