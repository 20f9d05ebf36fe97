"""Rows and replies of other servers, for the matrices of this one."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.matrix_file import matrix_bytes, merge_bytes
from retrieval_draft.index.matrix_rows import MOST_VISITS
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import CONTEXT, NodeLogits, TokenArray
from retrieval_draft.index.store.learned_entry import TOP, LearnedEntry
from retrieval_draft.index.store.rate_limit import RateLimit

__all__ = ["Learned"]

ROWS = 1 << 16
"""Rows kept for snapshots and for matrices that are attached later, 2 * `TOP` next tokens each."""

RECENT_TOKENS = 1 << 16
"""Tokens of others' newest replies that wait to be learned; older ones are looked up only."""

TOKENS_PER_SECOND = 50_000
"""Others' tokens that matrices learn in a second, on average: 2 to 4% of a core."""

MOST_CALIBRATION = 1 << 20
"""Bytes beyond which a snapshot's calibration is left out; a full one has 50 KB. A request's thread
reads it."""

_CHUNK = 64
_MOST_MARKS = 4096


class Learned:
    """Passes on to matrices the rows that other servers sent, and what follows in their replies.

    A reply tells of each of its n-grams what came next; rows tell what else might have. Rows are merged by
    their counts into a table too, from which snapshots are written.

    Args:
        vocabulary: Number of token ids.
        fingerprint: Of the tokenizer.

    Attributes:
        table: All rows that came, those of this server among them.
        own: Ids under which this server writes: its matrices know what it sent.
        calibration: The newest calibration that came, unchecked; empty for none.
        calibrated: Time at which it came, monotonic.
    """

    def __init__(self, vocabulary: int, fingerprint: str) -> None:
        self._vocabulary = vocabulary
        self._fingerprint = fingerprint
        self.table = AdjacencyMatrix(ROWS, 2 * TOP, MOST_VISITS)
        self.own: Collection[bytes] = ()
        self.calibration = b""
        self.calibrated = -math.inf
        self._matrices: WeakKeyDictionary[AdjacencyMatrix, int] = WeakKeyDictionary()
        self._marks: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self._recent: deque[tuple[TokenArray, int]] = deque()  # texts, and tokens of context in front
        self._first = 0  # the number of the first of `_recent`
        self._counted = 0
        self._tokens = 0
        self._rate = RateLimit(TOKENS_PER_SECOND)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of rows, and of texts that wait."""
        return self.table.nbytes + 4 * self._tokens

    def attach(self, matrix: AdjacencyMatrix) -> None:
        """Has a matrix learn what other servers have learned and will learn, as long as it lives."""
        with self._lock:
            self._matrices[matrix] = self._first
        if self.table.clock:
            self._give_all(matrix)

    def take(self, server: bytes, entry: LearnedEntry) -> None:
        """Adds a checked entry, once."""
        with self._lock:
            for sequence, start in entry.marks:
                # The runs come under the id that this one is the other of.
                self._marks[other_id(server), sequence] = start
            while len(self._marks) > _MOST_MARKS:
                self._marks.popitem(last=False)
            matrices = [] if server in self.own else list(self._matrices)
        if entry.calibration:
            self.calibration, self.calibrated = entry.calibration, time.monotonic()
        if entry.rows is not None:
            self.table.merge(entry.rows)
            for matrix in matrices:
                matrix.merge(entry.rows)

    def note(self, server: bytes, sequence: int, run: bytes) -> None:
        """Queues a run, uint32, to be learned in `work`; what of it is a prompt is left out."""
        with self._lock:
            start = self._marks.pop((server, sequence), 0)
            if server not in self.own:
                self._queue(np.frombuffer(run, "<u4").astype(np.int32), start)

    def work(self) -> None:
        """Learns from queued texts, as many as the rate allows, in small parts."""
        while True:
            with self._lock:
                end = self._first + len(self._recent)
                behind = [(at, matrix) for matrix, at in self._matrices.items() if at < end]
                if self._counted >= end and not behind:
                    return
                if not self._rate.allows(1, time.monotonic()):
                    return
                at, matrix = behind[0] if self._counted >= end else (self._counted, None)
                at = max(at, self._first)
                text, context = self._recent[at - self._first]
                if matrix is None:
                    self._counted = at + 1
                else:
                    self._matrices[matrix] = at + 1
            self._rate.wait(len(text), time.monotonic())
            if matrix is None:
                self.table.merge_frequent(text[context:], np.ones(len(text) - context, np.float32))
            else:
                _learn_text(matrix, text, context)

    def packed(self) -> bytes:
        """Table and calibration, for a snapshot."""
        return msgspec.msgpack.encode((matrix_bytes(self.table, self._fingerprint), self.calibration))

    def restore(self, packed: bytes, segments: Segments) -> None:
        """Starts from a snapshot.

        Args:
            packed: From `packed`, of any origin; empty for none.
            segments: The snapshot's texts, oldest first; the newest are learned from.

        Raises:
            DatastoreError: `packed` is torn, or holds what no matrix learns; the texts are learned from.
        """
        with self._lock:
            for text in _newest(segments):
                self._queue(text, 0)
        if packed:
            try:
                rows, calibration = msgspec.msgpack.decode(packed, type=tuple[bytes, bytes])
            except (msgspec.DecodeError, RecursionError) as error:
                raise DatastoreError(f"What was learned is torn: {error}.") from error
            if len(calibration) <= MOST_CALIBRATION:
                self.calibration = self.calibration or calibration
            merge_bytes(self.table, rows, self._fingerprint, self._vocabulary)
            for matrix in list(self._matrices):
                self._give_all(matrix)

    def after_fork(self) -> None:
        """Renews the lock in the child of a fork."""
        self._lock = threading.Lock()

    def _give_all(self, matrix: AdjacencyMatrix) -> None:
        matrix.merge(self.table.rows())
        matrix.merge_frequent(*self.table.frequent())

    def _queue(self, text: TokenArray, start: int) -> None:
        """Adds the reply of a run, with the context before it."""
        context = min(start, CONTEXT)
        text = text[start - context :]
        if len(text) <= max(1, context) or len(text) > RECENT_TOKENS:
            return
        self._recent.append((text, context))
        self._tokens += len(text)
        while self._tokens > RECENT_TOKENS:
            self._tokens -= len(self._recent.popleft()[0])
            self._first += 1


def other_id(server: bytes) -> bytes:
    """The id under which a server writes what it learned, from that of its runs; and the other way round."""
    return server[:-1] + bytes([server[-1] ^ 1])


def _learn_text(matrix: AdjacencyMatrix, text: TokenArray, context: int) -> None:
    """Teaches a matrix what followed each n-gram of a text, as if the target had been certain of it.

    Args:
        matrix: The matrix.
        text: int32, shape (n,).
        context: Tokens at its beginning that nothing is learned of but what follows them.
    """
    padded = np.concatenate((np.full(CONTEXT - 1, -1, np.int32), text[:-1]))
    contexts = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT)
    for begin in range(max(context - 1, 0), len(contexts), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        following = text[1:][part, None]
        matrix.learn(
            NodeLogits(contexts[part].copy(), following.copy(), np.ones(following.shape, np.float32))
        )


def _newest(segments: Segments) -> list[TokenArray]:
    """Texts of the newest segments, oldest first: about `RECENT_TOKENS` of them."""
    found: list[TokenArray] = []
    size = 0
    for segment in reversed(segments):
        joined = np.asarray(segment.tokens[-(RECENT_TOKENS - size) :]).astype(np.int32)
        size += len(joined)
        cuts = np.flatnonzero(joined == segment.separator)
        found[:0] = [part[part != segment.separator] for part in np.split(joined, cuts)]
        if size >= RECENT_TOKENS:
            break
    return found
