"""The shared datastore of one server: sends and receives texts, and serves lookups."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakSet, finalize

import numpy as np
import xxhash

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.observations import Observations
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.config import StoreConfig, check_share
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import ID_BYTES, EntryCodec
from retrieval_draft.index.store.health import Health
from retrieval_draft.index.store.keys import SHARDS, stream_key
from retrieval_draft.index.store.learned import other_id
from retrieval_draft.index.store.log_replica import LogReplica
from retrieval_draft.index.store.outbox import Outbox
from retrieval_draft.index.store.receiver import BLOCK, Receiver
from retrieval_draft.index.store.reconnecting_worker import ReconnectingWorker
from retrieval_draft.index.store.sender import Sender
from retrieval_draft.index.store.snapshots import SnapshotInfo
from retrieval_draft.index.store.snapshotter import Snapshotter
from retrieval_draft.index.store.url import parse_store_url

__all__ = ["SharedStore"]

KEY_VARIABLE = "RETRIEVAL_DRAFT_STORE_KEY"
_CLOSE_SECONDS = 2.0

CALIBRATION_SECONDS = 600.0
"""Seconds between the calibrations that all servers together send."""


class SharedStore:
    """Datastore that servers of one tenant and tokenizer share through Redis.

    Everything that waits for Redis, a disk or a merge runs in background threads. While Redis is down, slow,
    full or wiped only the texts of other servers are missing; those of this server wait in a bounded queue.

    Args:
        config: Address and limits.
        fingerprint: Of the tokenizer.
        vocabulary: Number of token ids; the tokenizer's, so that all servers have the same.
        environ: Environment with user, password and key where the configuration has none.

    Attributes:
        config: As given.
        server: 16 bytes that identify this server's entries.
        counts: Counters since the start.
        health: The state of the connection.
        mirror: The received texts.
        learned: Rows and replies of other servers, for matrices.

    Raises:
        InvalidInputError: The URL or a setting cannot be used.

    Example:
        store = SharedStore(StoreConfig("redis://localhost:6379"), fingerprint, vocabulary)
        store.share(prompt, reply)  # on other servers a few milliseconds later
    """

    def __init__(
        self,
        config: StoreConfig,
        fingerprint: str,
        vocabulary: int,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self.vocabulary = vocabulary
        self.namespace = f"{fingerprint}:{config.tenant}"
        self._url = parse_store_url(config.url, environ)
        self._codec = EntryCodec(self.namespace, config.key or environ.get(KEY_VARIABLE), config.max_tokens)
        self.counts = StoreCounts()
        self.mirror = LogReplica(vocabulary, self._codec, config, self.counts)
        self.learned = self.mirror.learned
        self._calibrated = -math.inf
        self._observed: WeakSet[Observations] = WeakSet()
        self._observing = lock_for_moments()
        self._lock = threading.Lock()
        self._asleep = False
        self._start()
        _stores.add(self)

    def _start(self) -> None:
        """Makes the state of one process: threads, connections, and the server's id."""
        config = self.config
        self.server = os.urandom(ID_BYTES)
        self.learned.own = (self.server, other_id(self.server))
        self.health = Health(str(self._url))
        self._stopped = threading.Event()
        begun = threading.Event()
        self._merge = threading.Event()
        self._connector = Connector(self._url, config.timeout)
        self._outbox = Outbox(config.queue_tokens)
        shard = xxhash.xxh3_64_intdigest(self.server) % SHARDS
        self._sender = Sender(
            self.server,
            [stream_key(self.namespace, str((shard + other) % SHARDS)) for other in range(SHARDS)],
            self._outbox,
            self.mirror,
            self._codec,
            self._link("sending", 0.0),
            config,
            self.counts,
            self.vocabulary,
            self._connector.is_cluster,
            self._stopped,
            config.stream_bytes // SHARDS,
        )
        keys = {str(each): stream_key(self.namespace, str(each)) for each in range(SHARDS)}
        # A cluster has no command that reads streams of several slots.
        groups = [{shard: key} for shard, key in keys.items()] if self._connector.is_cluster else [keys]
        self._receivers = [
            Receiver(
                group,
                self.mirror,
                self._codec.most_bytes,
                self._link("receiving", BLOCK),
                self._connector.is_cluster,
                self._stopped,
                self._merge.set,
                self._sender.look_again,
                self._sender.put_back,
            )
            for group in groups
        ]
        self._snapshotter = Snapshotter(self._connector, self.mirror, config, self.namespace, self.vocabulary,
                                        self.counts, self._stopped)  # fmt: skip
        # No thread references the store itself, so that an unclosed store ends with its last user.
        work: list[tuple[str, Callable[[], None], int]] = [
            ("sender", self._sender.run, 0),
            *(("receiver", partial(_after, begun, receiver.run), 0) for receiver in self._receivers),
            ("merger", partial(_merge, self.mirror, self._merge, self._stopped), 10),
            ("snapshots", partial(self._snapshotter.run, begun), 10),
        ]
        self._threads = [
            threading.Thread(target=_nicely, args=(run, nice), name=f"retrieval_draft {name}", daemon=True)
            for name, run, nice in work
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = finalize(self, _end, self._stopped, self._outbox, self._merge, self._connector)
        self._finalizer.atexit = False
        self._asleep = False

    def _link(self, channel: str, block: float) -> ReconnectingWorker:
        return ReconnectingWorker(self._connector, channel, block, self.health, self.counts, self._stopped)

    @property
    def segments(self) -> Segments:
        """All shared texts, for lookups: immutable segments, oldest first."""
        if self._asleep:
            self._wake()
        return self.mirror.segments

    @property
    def nbytes(self) -> int:
        """Bytes of shared text and of texts waiting to be sent."""
        return self.mirror.nbytes + self._outbox.nbytes + self._sender.nbytes

    def share(self, prompt: TokenArray, reply: TokenArray, share: str | None = None) -> None:
        """Queues a finished request to be sent. Never blocks.

        Args:
            prompt: int32, shape (n,). Sent only with "all", and only its parts that the store does not hold.
            reply: int32, shape (m,).
            share: "none", "reply" or "all"; None for the configured value.

        Raises:
            InvalidInputError: `share` is something else.
        """
        chosen = check_share(self.config.share if share is None else share)
        if self._asleep:
            self._wake()
        if chosen == "none" or self._stopped.is_set():
            return
        with self._observing:
            found = [each for each in self._observed if each.belong_to(prompt, reply)]
        learned = found[0].shareable(chosen == "all") if found else ()
        self._outbox.put(prompt if chosen == "all" else np.empty(0, np.int32), reply, learned)

    def observe(self, prompt: TokenArray) -> Observations | None:
        """Collects a request's predictions, which others learn if its text is shared as long as this lives.

        Args:
            prompt: int32, shape (n,).

        Returns:
            None where rows are not shared.
        """
        if not self.config.row_share or self._stopped.is_set():
            return None
        made = Observations(prompt)
        with self._observing:
            self._observed.add(made)
        return made

    def wants_calibration(self) -> bool:
        """True once where this server is to send one, as no server has for ten minutes."""
        now = time.monotonic()
        if not self.config.row_share or self.config.share == "none" or self._stopped.is_set():
            return False
        if now - max(self.learned.calibrated, self._calibrated) < CALIBRATION_SECONDS:
            return False
        self._calibrated = now
        return True

    def share_calibration(self, content: bytes) -> None:
        """Queues a calibration's file, which holds no tokens, to be sent with the next texts."""
        if len(content) < 4 * self.config.max_tokens - 64:
            self._outbox.calibration = content

    def wait_ready(self, timeout: float = 5.0) -> bool:
        """Waits until the log has been read to its end once, or is known to be unreadable now.

        Returns:
            True if it has been read.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end and not self._stopped.is_set():
            if all(receiver.caught_up.is_set() for receiver in self._receivers):
                return True
            if self.health.state not in ("connecting", "connected"):
                return False
            time.sleep(0.005)
        return False

    def flush(self, timeout: float = 2.0) -> bool:
        """Waits until shared texts can be looked up here, unless Redis is down.

        Returns:
            False where it is down, or after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end and not self._stopped.is_set():
            last = self._sender.sequence - 1
            if self._sender.idle and (last < 0 or self.mirror.seen(self.server, last)):
                self.mirror.publish()
                if not self.mirror.unsorted:
                    return True
                self._merge.set()
            if self.health.state not in ("connecting", "connected"):
                return False
            time.sleep(0.001)
        return False

    def snapshot(self) -> SnapshotInfo:
        """Writes a snapshot now, even if another server does.

        Raises:
            DatastoreError: No storage is configured, or it cannot be written.
        """
        return self._snapshotter.write()

    def status(self) -> dict[str, Any]:
        """State and counts, for users and metrics."""
        return {
            "store": str(self._url),
            "namespace": self.namespace,
            "server": self.server.hex(),
            "state": self.health.state,
            "reason": self.health.reason,
            "state_changes": self.health.changes,
            "state_seconds": time.time() - self.health.since,
            "entries": self.mirror.entries,
            "learned_entries": self.mirror.learned_entries,
            "rows": self.learned.table.filled,
            "digest": f"{self.mirror.digest:016x}",
            "tokens": self.mirror.pile.num_tokens,
            "segments": len(self.segments),
            "evicted_tokens": self.mirror.pile.evicted,
            "servers": len(self.mirror.writers()),
            "nbytes": self.nbytes,
            "waiting": len(self._outbox),
            "unsent_dropped": self._outbox.dropped,
            **self.counts.as_dict(),
        }

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Sends waiting texts if Redis answers, and ends the threads. Received texts stay usable."""
        with self._lock:
            if self._stopped.is_set() or self._asleep:
                return
            end = time.monotonic() + timeout
            hopeful = ("connecting", "connected")
            while not self._sender.idle and self.health.state in hopeful and time.monotonic() < end:
                time.sleep(0.005)
            self._stopped.set()
            self._outbox.wake()
            self._merge.set()
            self._finalizer.detach()
            for thread in self._threads:
                thread.join(max(0.0, end + BLOCK + 0.5 - time.monotonic()))
            self.health.close()
            with suppress(OSError, DatastoreError):
                self._connector.close()

    def _wake(self) -> None:
        """Restarts in a child of a fork, which does not have the parent's threads."""
        with self._lock:
            if self._asleep:
                self._start()

    def __enter__(self) -> SharedStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _after(begun: threading.Event, run: Callable[[], None]) -> None:
    begun.wait()
    run()


def _merge(mirror: LogReplica, wake: threading.Event, stopped: threading.Event) -> None:
    while not stopped.is_set():
        wake.wait(1.0)
        wake.clear()
        while not stopped.is_set() and (mirror.sort() or mirror.pile.compact()):
            pass
        mirror.pile.free_retired()


def _end(stopped: threading.Event, outbox: Outbox, merge: threading.Event, connector: Connector) -> None:
    """Ends the threads without waiting for them."""
    stopped.set()
    outbox.wake()
    merge.set()
    with suppress(OSError, DatastoreError):
        connector.close()


def _nicely(run: Callable[[], None], nice: int) -> None:
    if nice:
        with suppress(OSError, AttributeError):  # leave the cores to decoding
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    run()


_stores: WeakSet[SharedStore] = WeakSet()


def _after_fork() -> None:
    """Resets stores in a child of a fork, which is a server with its own id, connections and threads."""
    for store in list(_stores):
        store._lock = threading.Lock()
        store.mirror.after_fork()
        store._finalizer.detach()
        store._asleep = not store._stopped.is_set()


@atexit.register
def _at_exit() -> None:
    """Sends waiting texts before the process ends."""
    for store in list(_stores):
        store.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
