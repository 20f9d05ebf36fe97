"""The thread that reads the log as it grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retrieval_draft.index.store.log_reader import LogReader
from retrieval_draft.index.store.log_replica import LogReplica, stream_id
from retrieval_draft.index.store.reconnecting_worker import ReconnectingWorker, server_run

__all__ = ["BLOCK", "Receiver"]

BLOCK = 0.5
"""Seconds that a read waits in Redis. An idle server checks at this interval that the streams are still the
same."""

_SECONDS = 0.02
"""Interval in seconds at which a segment is made while there is more to read, unless enough tokens arrive
before."""

_SEGMENTS = 24
"""Number of segments above which, as with many tokens to sort, reading waits for the thread that merges."""

OVERLAP = 60_000
"""Milliseconds of the log that are read again after Redis restarted or another server took over. Its clock
may be slow, and then new entries come before those already read."""


class Receiver:
    """Tails streams into a mirror.

    A position is kept for each stream, and the next read starts after it. Where Redis restarts, fails over or
    is wiped, the streams may be shorter than they were and continue with ids before our position: then the
    last minute is read again, or all of a stream whose last id is lower than our position. The mirror adds no
    entry twice.

    Args:
        keys: For each shard its stream.
        mirror: Receives the entries.
        most: Largest size of an entry in bytes.
        link: To Redis.
        is_cluster: Whether it is a cluster.
        stopped: Ends the thread when set.
        wake_merger: Called after new segments.
        lost: Called after a failed connection.
        put_back: Called with entries that Redis has lost.
    """

    def __init__(
        self,
        keys: Mapping[str, bytes],
        mirror: LogReplica,
        most: int,
        link: ReconnectingWorker,
        is_cluster: bool,
        stopped: threading.Event,
        wake_merger: Callable[[], None],
        lost: Callable[[], None],
        put_back: Callable[[Sequence[bytes]], None],
    ) -> None:
        self._shards = {key: shard for shard, key in keys.items()}
        self._mirror = mirror
        self._most = most
        self._link = link
        self._is_cluster = is_cluster
        self._stopped = stopped
        self._wake_merger = wake_merger
        self._lost = lost
        self._put_back = put_back
        self._lost_at: float | None = None
        self._run: str | None = None
        self._client: Any = None
        self._reader: LogReader | None = None
        self._starts: dict[bytes, bytes] = {}
        self._since = 0.0
        self.caught_up = threading.Event()

    def run(self) -> None:
        """Runs the thread until stopped."""
        self._link.run(self._work, self._fail)

    def _fail(self) -> None:
        self._client = None
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        self._mirror.publish()
        self._lost()

    def _work(self, client: Any) -> None:
        """Reads once; on a new connection finds the start positions first."""
        if client is not self._client or self._reader is None:
            self._reader = LogReader(client, self._most)
            self._find_starts(client, self._reader)
            self._client = client
            self._since = time.monotonic()
        # Wait for more only after everything is read and is in a segment.
        waiting = bool(self._mirror.waiting_tokens)
        at_end = self.caught_up.is_set() and not waiting
        found, more = self._reader.read(self._starts)
        if at_end and not found:
            found = self._reader.wait(self._starts, BLOCK)
        self._link.worked()
        self._mirror.learned.work()
        missing = self._mirror.recent.missing()
        if missing:
            self._put_back(missing)
        if not found:
            if waiting:
                self._publish()
            elif at_end:
                self._check_reset(self._reader)
            self._note_end()
            return
        if not waiting:
            self._since = time.monotonic()
        for key, items in found:
            self._mirror.take(self._shards[key], items)
            self._starts[key] = items[-1][0]
        enough = (
            self._mirror.waiting_tokens >= self._mirror.batch_tokens
            or time.monotonic() - self._since > _SECONDS
        )
        if enough or not more:
            self._publish()
        self._mirror.learned.work()  # after the texts: they can be looked up before they are learned
        if not more:
            self._note_end()

    def _note_end(self) -> None:
        self._mirror.recent.caught_up()
        self.caught_up.set()

    def _publish(self) -> None:
        self._mirror.publish()
        self._wake_merger()
        mirror = self._mirror
        while (mirror.unsorted or len(mirror.segments) > _SEGMENTS) and not self._stopped.wait(0.005):
            self._wake_merger()
        self._since = time.monotonic()

    def _find_starts(self, client: Any, reader: LogReader) -> None:
        """Starts after the last added entries; earlier where the streams may be other ones than before."""
        run = server_run(client, self._is_cluster)
        moved = run is None or run != self._run
        for key, shard in self._shards.items():
            position = self._mirror.positions.get(shard, b"0-0")
            last = reader.last_id(key)
            if last is not None and stream_id(last) < stream_id(position):
                self._mirror.reread(shard, from_start=True)
                position = b"0-0"
            elif moved and position != b"0-0":
                self._mirror.reread(shard, from_start=False)
                position = b"%d-0" % max(0, stream_id(position)[0] - OVERLAP)
            self._starts[key] = position
        if moved and self._lost_at is not None:
            self._mirror.recent.mark_lost(self._lost_at)
        self._lost_at = None
        self._run = run

    def _check_reset(self, reader: LogReader) -> None:
        """Detects streams that were deleted and new ones that start before our position."""
        for key, shard in self._shards.items():
            last = reader.last_id(key)
            if last is not None and stream_id(last) < stream_id(self._starts[key]):
                self._mirror.reread(shard, from_start=True)
                self._starts[key] = b"0-0"
