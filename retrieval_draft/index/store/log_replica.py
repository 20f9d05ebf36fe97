"""One server's copy of the shared log: every entry once, ready to be looked up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.segments.segment import Segment, text_dtype
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.segments.segment_store import SMALL, SegmentStore
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import FORMAT_VERSION, Entry, EntryCodec, RejectedEntryError
from retrieval_draft.index.store.gil_yielder import GilYielder
from retrieval_draft.index.store.learned import Learned
from retrieval_draft.index.store.learned_entry import LearnedEntry, unpack_learned
from retrieval_draft.index.store.rate_limit import RateLimit
from retrieval_draft.index.store.replay_buffer import ReplayBuffer
from retrieval_draft.index.store.sequence_set import SequenceSet
from retrieval_draft.index.store.snapshots import LogState
from retrieval_draft.index.store.stream_clock import StreamClock

__all__ = ["FIELD", "KEPT_SECONDS", "Item", "LogReplica", "stream_id"]

KEPT_SECONDS = 5.0
"""Seconds for which accepted entries are kept: with appendfsync everysec a crash loses about two seconds of
them, and a failover those that the replica did not have yet."""

FIELD = b"e"
"""The only field of a stream entry."""

Item = Sequence[Any]
"""A stream entry as Redis returns it: its id, and field and value in turn, or a dict of them (redis-py's
client of a cluster), or None where it was deleted; for one that is too long and was not read, its size."""

MAX_SERVERS = 1 << 16
_BATCH_TOKENS = 1 << 19

_Read = tuple[Entry, float, bytes, LearnedEntry | None]
"""An entry, the time of its id, itself as it was read, and what was learned where it holds that."""


class _Writer:
    """State of a server that writes to the log."""

    __slots__ = ("known", "last", "rate", "shard")

    def __init__(self, known: SequenceSet, rate: RateLimit, last: float) -> None:
        self.known = known
        self.rate = rate
        self.last = last
        self.shard = ""


class LogReplica:
    """Adds entries of the log, each once, even if read twice or in another order.

    Its state is a set of entries, those in `writers`, and a position in each stream before which none is
    missing. Both change together under `lock`.

    Args:
        vocabulary: Number of token ids.
        codec: Reads the entries.
        config: Limits.
        counts: Counters to add to.

    Attributes:
        pile: The text, for lookups.
        learned: Rows and replies, for matrices.
        positions: For each shard the id of the last added entry.
        batch_tokens: Tokens of a segment, where many arrive at once.
        entries: Number of texts added, those of a snapshot included.
        learned_entries: Number of entries added with what was learned.
        digest: Sum of the hashes of all added entries, below 2^64: two mirrors of the same entries have the
            same, in any order of arrival.
    """

    def __init__(self, vocabulary: int, codec: EntryCodec, config: StoreConfig, counts: StoreCounts) -> None:
        self.lock = threading.Lock()
        self.pile = SegmentStore(vocabulary, config.max_bytes)
        self.positions: dict[str, bytes] = {}
        self.learned = Learned(vocabulary, codec.fingerprint)
        self.entries = self.learned_entries = 0
        self.digest = 0
        self.batch_tokens = min(_BATCH_TOKENS, config.max_bytes // 64)  # so that eviction has small units
        self._vocabulary = vocabulary
        self._codec = codec
        self._rate = config.tokens_per_second
        self._keep_seconds = config.stream_seconds
        self._counts = counts
        self._writers: dict[bytes, _Writer] = {}
        self._highest: dict[str, tuple[int, int]] = {}
        self._clocks: dict[str, StreamClock] = {}
        self._separator = np.array([vocabulary], "<u4").tobytes()
        self._texts: list[NDArray[Any]] = []
        self._lengths: list[int] = []
        self.recent = ReplayBuffer(KEPT_SECONDS + config.timeout)
        self._unsorted: deque[tuple[NDArray[Any], NDArray[np.int32]]] = deque()
        self._sorting = threading.Lock()
        self._breather = GilYielder()

    @property
    def segments(self) -> Segments:
        """Oldest first; a tuple that never changes."""
        return self.pile.segments

    @property
    def nbytes(self) -> int:
        """Bytes of texts that can be looked up, and of those about to be."""
        unsorted = sum(text.nbytes for text, _ in tuple(self._unsorted))
        waiting = sum(text.nbytes for text in self._texts)
        return self.pile.nbytes + waiting + unsorted + self.recent.nbytes + self.learned.nbytes

    @property
    def waiting_tokens(self) -> int:
        """Added tokens that `publish` has not made a segment of."""
        return sum(map(len, self._texts))

    @property
    def unsorted(self) -> int:
        """Batches of many tokens that wait for `sort`."""
        return len(self._unsorted)

    def seen(self, server: bytes, sequence: int) -> bool:
        """True if an entry was added."""
        writer = self._writers.get(server)
        return writer is not None and sequence in writer.known

    def writers(self) -> Mapping[bytes, SequenceSet]:
        """Sequence numbers added from each server; a copy of the table."""
        return {server: writer.known for server, writer in list(self._writers.items())}

    def take(self, shard: str, items: Sequence[Item]) -> None:
        """Adds entries of one stream, in their order.

        Args:
            shard: The stream's shard.
            items: At least one.
        """
        with self.lock:
            self._breather.rested()
            first, last = stream_id(items[0][0]), stream_id(items[-1][0])
            highest = self._highest.get(shard, (-1, -1))
            known = first <= highest  # read again: repeated drops are not counted
            read: list[_Read] = []
            suspicious = self.recent.is_suspicious
            clock = self._clocks.setdefault(shard, StreamClock())
            now = time.monotonic()
            for number, item in enumerate(items):
                if not number % 4:
                    self._breather.yield_gil()
                at = stream_id(item[0])
                again = known and at <= highest
                seconds = clock.at(at[0] / 1000, now)
                if not again:
                    self._counts.received += 1
                try:
                    payload = _payload(item)
                    entry = self._codec.decode(payload)
                    found = None if entry.version == FORMAT_VERSION else self._unpacked(entry)
                except RejectedEntryError as rejected:
                    if not again:
                        self._counts.dropped[rejected.reason] += 1
                    continue
                read.append((entry, seconds, payload, found))
                if suspicious:
                    self.recent.seen(entry.server, entry.sequence)
            self._ingest(shard, self._in_vocabulary(read, not known))
            self.positions[shard] = items[-1][0]
            self._highest[shard] = max(highest, last)

    def after_fork(self) -> None:
        """Renews locks in the child of a fork: one that another thread held would stay locked."""
        self.lock, self._sorting = threading.Lock(), threading.Lock()
        self.learned.after_fork()
        self.pile.after_fork()

    def reread(self, shard: str, from_start: bool) -> None:
        """Prepares for reading a part of a stream again.

        Args:
            shard: The stream's shard.
            from_start: Whether it is another stream than before, whose entries count again.
        """
        self._counts.rereads += 1
        if from_start:
            self._highest.pop(shard, None)
            self._clocks.setdefault(shard, StreamClock()).restart()

    def publish(self) -> None:
        """Makes the entries added since the last call a segment, so that they can be looked up.

        Sorts few tokens at once; many are left to the thread that calls `sort`.
        """
        with self.lock:
            self._publish()

    def sort(self) -> bool:
        """Makes a segment of a batch of many tokens.

        Returns:
            True if there was one.
        """
        with self._sorting:
            if not self._unsorted:
                return False
            self.pile.add(Segment.join(*self._unsorted[0], self._vocabulary))
            self._unsorted.popleft()
        return True

    def snapshot(self, namespace: str) -> tuple[Segments, LogState, bytes]:
        """The text, its position in the log and the rows, all of one moment."""
        with self.lock:
            self._publish()
            while self.sort():
                pass
            state = LogState(
                namespace=namespace,
                positions={shard: at.decode() for shard, at in self.positions.items()},
                writers={server.hex(): writer.known.bounds for server, writer in self._writers.items()},
                entries=self.entries,
                digest=f"{self.digest:016x}",
                created=time.time_ns() // 1_000_000,
            )
            return self.pile.segments, state, self.learned.packed()

    def restore(self, segments: Segments, state: LogState) -> None:
        """Starts from a snapshot instead of an empty state."""
        with self.lock:
            for segment in segments:
                self.pile.add(segment)
            self.positions = {shard: at.encode() for shard, at in state.positions.items()}
            self._highest = {shard: stream_id(at) for shard, at in self.positions.items()}
            self.entries, self.digest = state.entries, int(state.digest, 16)
            for server, bounds in state.writers.items():
                known = SequenceSet(bounds)
                self._writers[bytes.fromhex(server)] = _Writer(known, RateLimit(self._rate), 0.0)

    def _unpacked(self, entry: Entry) -> LearnedEntry:
        """Reads and checks what was learned.

        Raises:
            RejectedEntryError: No server can have learned it.
        """
        try:
            return unpack_learned(entry.tokens, self._vocabulary)
        except DatastoreError as error:
            raise RejectedEntryError("malformed") from error

    def _in_vocabulary(self, read: list[_Read], count: bool) -> list[_Read]:
        runs = [entry.tokens for entry, _, _, found in read if found is None]
        if not runs or int(np.frombuffer(b"".join(runs), "<u4").max()) < self._vocabulary:
            return read
        kept = [
            each
            for each in read
            if each[3] is not None or int(np.frombuffer(each[0].tokens, "<u4").max()) < self._vocabulary
        ]
        if count:
            self._counts.dropped["vocabulary"] += len(read) - len(kept)
        return kept

    def _ingest(self, shard: str, read: Sequence[_Read]) -> None:
        """Keeps the entries that are new, unless their server adds too many."""
        runs: list[bytes] = []
        now = time.monotonic()
        for number, (entry, seconds, payload, found) in enumerate(read):
            if not number % 8:
                self._breather.yield_gil()
            writer = self._writers.get(entry.server)
            if writer is None:
                writer = self._new_writer(entry.server, seconds)
                if writer is None:
                    self._counts.dropped["servers"] += 1
                    continue
            if not writer.known.add(entry.sequence):
                self._counts.duplicates += 1
                continue
            writer.last = seconds
            if writer.shard != shard:  # each stream has its own time
                writer.shard = shard
                writer.rate.restart(seconds)
            if not writer.rate.allows(len(entry.tokens) // 4, seconds):
                self._counts.dropped["rate"] += 1
                continue
            if found is None:
                runs.append(entry.tokens)
                self.learned.note(entry.server, entry.sequence, entry.tokens)
            else:
                self.learned_entries += 1
                self.learned.take(entry.server, found)
            self.recent.note(entry.server, entry.sequence, payload, now)
            self.digest += xxhash.xxh3_64_intdigest(
                entry.server + entry.sequence.to_bytes(8, "little") + entry.tokens
            )
        self.digest %= 1 << 64
        if not runs:
            return
        self.entries += len(runs)
        self._counts.ingested += len(runs)
        text = np.frombuffer(self._separator.join(runs) + self._separator, "<u4")
        self._counts.ingested_tokens += len(text) - len(runs)
        self._texts.append(text.astype(text_dtype(self._vocabulary)))
        self._lengths.extend([len(run) // 4 + 1 for run in runs])

    def _new_writer(self, server: bytes, seconds: float) -> _Writer | None:
        if len(self._writers) >= MAX_SERVERS:
            # The log has no more entries of servers that were silent for so long.
            oldest = seconds - 2 * self._keep_seconds
            self._writers = {name: each for name, each in self._writers.items() if each.last >= oldest}
            if len(self._writers) >= MAX_SERVERS:
                return None
        writer = _Writer(SequenceSet(), RateLimit(self._rate), seconds)
        self._writers[server] = writer
        return writer

    def _publish(self) -> None:
        if not self._texts:
            return
        lengths = np.array(self._lengths, np.int32)
        documents = np.cumsum(lengths, dtype=np.int32) - lengths
        joined = np.concatenate(self._texts)
        self._texts, self._lengths = [], []
        # Many long runs may arrive in one answer: still no segment may fill the cap.
        cuts = np.flatnonzero(np.diff(documents // (2 * self.batch_tokens))) + 1
        for part in np.split(documents, cuts):
            begin, end = int(part[0]), int(part[-1]) + int(lengths[len(part) - 1])
            lengths = lengths[len(part) :]
            self._add(joined if len(part) == len(documents) else joined[begin:end].copy(), part - part[0])

    def _add(self, joined: NDArray[Any], documents: NDArray[np.int32]) -> None:
        if len(joined) > SMALL or self._unsorted:  # eviction follows age, so the order is kept
            self._unsorted.append((joined, documents))
            return
        self.pile.add(Segment.join(joined, documents, self._vocabulary))
        self.pile.compact(SMALL)  # in the receiving thread, to keep segments few


def stream_id(name: bytes) -> tuple[int, int]:
    """A stream entry's id as numbers: milliseconds, and its index within them.

    Example:
        b"1763972285000-2"  ->  (1763972285000, 2)
    """
    milliseconds, _, number = name.partition(b"-")
    return int(milliseconds), int(number or 0)


def _payload(item: Item) -> Any:
    """The value of our field, or None where the entry holds anything else.

    Raises:
        RejectedEntryError: It was too long to be read.
    """
    fields = item[1]
    if isinstance(fields, int):
        raise RejectedEntryError("length")
    if isinstance(fields, list):
        return fields[1] if len(fields) == 2 and fields[0] == FIELD else None
    return fields.get(FIELD) if isinstance(fields, dict) and len(fields) == 1 else None
