"""Reads the log as it grows."""

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
"""Seconds that a read waits in Redis. An idle server asks so often whether the streams are still the same."""

_SECONDS = 0.02
"""While there is more to read, a segment is made of what came in that time, or of enough tokens."""

_SEGMENTS = 24
"""Where there are more segments, or many tokens to sort, reading waits for the thread that does that."""

OVERLAP = 60_000
"""Milliseconds of the log that are read again after Redis restarted or another server took over. Its clock
may be behind, and then entries come in front of those already read."""


class Receiver:
    """Tails streams into a mirror.

    A position is kept for each stream, and the next read starts behind it. Where Redis restarts, fails over
    or is wiped, the streams may be shorter than they were and go on with ids that are already behind us: then
    the last minute is read again, or all of a stream whose last id is lower than our position. The mirror
    takes nothing in twice.

    Args:
        keys: For each shard its stream.
        mirror: Where entries go.
        most: Bytes that an entry may have.
        link: To Redis.
        is_cluster: Whether it is a cluster.
        stopped: Ends everything.
        wake_merger: Called when segments came in.
        lost: Called when the connection failed.
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
        """The thread: until stopped."""
        self._link.run(self._work, self._fail)

    def _fail(self) -> None:
        self._client = None
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        self._mirror.publish()
        self._lost()

    def _work(self, client: Any) -> None:
        """Reads once, after finding out where to start if the connection is new."""
        if client is not self._client or self._reader is None:
            self._reader = LogReader(client, self._most)
            self._find_starts(client, self._reader)
            self._client = client
            self._since = time.monotonic()
        # Only who has read all there is, and made it a segment, waits for more.
        waiting = bool(self._mirror.waiting_tokens)
        at_end = self.caught_up.is_set() and not waiting
        found, more = self._reader.read(self._starts)
        if at_end and not found:
            found = self._reader.wait(self._starts, BLOCK)
        self._link.worked()
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
        """Behind what is in; further back where the streams may not be those that we read from."""
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
        """Notices that streams were deleted, and that new ones have started below our position."""
        for key, shard in self._shards.items():
            last = reader.last_id(key)
            if last is not None and stream_id(last) < stream_id(self._starts[key]):
                self._mirror.reread(shard, from_start=True)
                self._starts[key] = b"0-0"
