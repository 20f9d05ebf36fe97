"""Earlier requests of this process, as segments that are merged and evicted in the background.

A log-structured store: what a finished request said becomes a small segment at once, and segments of like
size are merged into larger ones, so there are never more than a handful. Everything is immutable; readers
take the current tuple and need no lock.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet, ref

import numpy as np

from retrieval_draft.errors import DatastoreError, InvalidInputError, RetrievalDraftError
from retrieval_draft.index.building.merge import join_segments
from retrieval_draft.index.index_folder import IndexFolder, SegmentEntry
from retrieval_draft.index.segment import Segment, match_state
from retrieval_draft.index.segment_session import Segments, SegmentSession, segments_nbytes
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray

__all__ = ["History", "HistorySource"]

RATIO = 4
"""A segment is merged with the newer ones unless it is so many times as large as they are together: there are
about log(tokens) / log(4) segments, and a token is sorted about three times as often as that."""

SHARE = 8
"""A segment with 1 / 8 of the bytes allowed is merged no more, so that eviction has pieces."""

QUEUE_TOKENS = 1 << 22
"""Tokens that may wait for the background thread. Beyond them the oldest request waiting is dropped."""

_UNTOLD = 3
"""Matches shorter than a sort key (4 tokens at most) are not told apart from none."""

GRACE = 1.0
"""Seconds that a segment nobody is to use any more is kept for those who still do."""

_log = logging.getLogger("retrieval_draft")


class History:
    """Texts of finished requests.

    Args:
        vocabulary: Ids are below it.
        max_bytes: The oldest segments go when all together take more.
        folder: Where to keep it, or None to forget it at exit. One process at a time writes there;
            a second one reads what is there and keeps its own texts in memory.
        fingerprint: Of the tokenizer, which the folder is checked against.

    Attributes:
        dropped: Requests that were not kept because too many were waiting.
        evicted: Tokens that went to make room.
        failures: Times that the folder could not be written.
    """

    def __init__(
        self, vocabulary: int, max_bytes: int, folder: Path | None = None, fingerprint: str = ""
    ) -> None:
        if max_bytes < 1 << 20:
            raise InvalidInputError(f"max_bytes is {max_bytes}; a history needs at least {1 << 20}.")
        self._vocabulary = vocabulary
        self._max_bytes = max_bytes
        self._segments: Segments = ()
        self._entries: WeakKeyDictionary[Segment, SegmentEntry] = WeakKeyDictionary()
        self._waiting: deque[tuple[TokenArray, TokenArray]] = deque()
        self._waiting_tokens = 0
        self._leaving: deque[tuple[float, list[Segment]]] = deque()
        self._busy = False
        self._closed = False
        self._worker: threading.Thread | None = None
        self._changed = threading.Condition()
        self._index: IndexFolder | None = None
        self._stack = ExitStack()
        self.dropped = 0
        self.evicted = 0
        self.failures = 0
        if folder is not None:
            self._attach(IndexFolder.create(folder, fingerprint, vocabulary))
        _histories.add(self)

    @property
    def segments(self) -> Segments:
        """Oldest first; a tuple that never changes."""
        return self._segments

    @property
    def num_tokens(self) -> int:
        """Tokens that can be looked up now."""
        return sum(segment.num_tokens for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments and of what waits."""
        return segments_nbytes(self._segments) + 4 * self._waiting_tokens

    def add(self, prompt: TokenArray, reply: TokenArray) -> None:
        """Takes a finished request in; it can be looked up a little later. Never waits.

        Args:
            prompt: int32. Of it only what is not known yet is kept, so that a long conversation, which
                comes again with every turn, is stored once. May be empty.
            reply: int32. Kept whole, for how often something was said counts. May be empty.
        """
        if len(prompt) + len(reply) == 0:
            return
        with self._changed:
            if self._closed:
                return
            self._waiting.append((np.array(prompt, np.int32), np.array(reply, np.int32)))
            self._waiting_tokens += len(prompt) + len(reply)
            while self._waiting_tokens > QUEUE_TOKENS and len(self._waiting) > 1:
                oldest = self._waiting.popleft()
                self._waiting_tokens -= sum(map(len, oldest))
                self.dropped += 1
            if self._worker is None:
                self._worker = threading.Thread(
                    target=_work, args=(ref(self),), name="retrieval_draft history", daemon=True
                )
                self._worker.start()
            self._changed.notify_all()

    def limit(self, max_bytes: int) -> None:
        """Changes how many bytes are kept; what is over goes when the next request comes in."""
        self._max_bytes = max_bytes

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything added can be looked up.

        Returns:
            False where `timeout` seconds were not enough.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Keeps what waits, and stops the background thread. What is in memory stays usable."""
        if self._worker is not None:
            self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._stack.close()

    def _attach(self, index: IndexFolder) -> None:
        try:
            self._stack.enter_context(index.locked())
        except DatastoreError:
            _log.warning(
                "The history in %s is being written by another process; this one only reads it.", index.path
            )
        else:
            self._index = index
            index.sweep()
        self._segments = index.segments()
        self._entries.update(zip(self._segments, index.manifest.segments, strict=True))

    def _take(self) -> list[tuple[TokenArray, TokenArray]]:
        """Waits for requests, and takes all there are."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout=1.0)
            taken = list(self._waiting)
            self._waiting.clear()
            self._waiting_tokens = 0
            self._busy = bool(taken)
            return taken

    def _ingest(self, taken: Sequence[tuple[TokenArray, TokenArray]]) -> None:
        """Adds requests, merges and evicts: new tuples, then one assignment."""
        texts: list[TokenArray] = []
        for prompt, reply in taken:
            texts += _new_texts(self._segments, prompt, reply)
        texts = [text[(text >= 0) & (text < self._vocabulary)] for text in texts]
        texts = [text for text in texts if len(text) > 1]
        if not texts:
            return
        segments = [*self._segments, Segment.build(texts, self._vocabulary)]
        self._segments = tuple(segments)  # it can be looked up at once; merging may take a while
        most = self._max_bytes // SHARE
        while len(segments) > 1 and segments[-2].nbytes < RATIO * segments[-1].nbytes:
            if segments[-2].nbytes + segments[-1].nbytes > most and segments[-2].nbytes > most // 2:
                break
            segments[-2:] = [join_segments(segments[-2:], self._vocabulary)]
        while len(segments) > 1 and segments_nbytes(segments) > self._max_bytes:
            self.evicted += segments.pop(0).num_tokens
        gone = [segment for segment in self._segments if segment not in segments]
        self._segments = tuple(segments)
        # Giving memory back takes a while, and requests let go of a segment in the middle of a step: so the
        # last one to let go is this thread.
        self._leaving.append((time.monotonic() + GRACE, gone))
        self._persist(self._segments)

    def _persist(self, segments: Segments) -> None:
        """Brings the folder to what is in memory. Failing costs the copy on disk, nothing else."""
        index = self._index
        if index is None:
            return
        try:
            for segment in segments:
                if segment not in self._entries:
                    self._entries[segment] = index.write(segment)
            index.publish([self._entries[segment] for segment in segments])
            index.sweep()
        except (OSError, RetrievalDraftError) as error:
            if not self.failures:
                _log.warning("The history is not kept on disk for now: %s", error)
            self.failures += 1

    def _serve(self) -> bool:
        """One round of the background thread.

        Returns:
            Whether there may be another.
        """
        taken = self._take()
        while self._leaving and self._leaving[0][0] <= time.monotonic():
            self._leaving.popleft()
        if taken:
            try:
                self._ingest(taken)
            except Exception as error:  # a request's text is lost, the process goes on
                self.failures += 1
                _log.warning("A request's text could not be added to the history: %r", error, exc_info=error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        return not (self._closed and not self._waiting)


class HistorySession:
    """Drafts from the history, and becomes part of it at its end."""

    def __init__(self, history: History, prompt: TokenArray, keep_prompt: bool, keep_reply: bool) -> None:
        self._history = history
        self._keep_reply = keep_reply
        self._prompt = np.array(prompt, np.int32) if keep_prompt else np.empty(0, np.int32)
        self._reply: list[TokenArray] = []
        self._lookup = SegmentSession(lambda: history.segments, prompt, "history", "history")

    def propose(self, budget: int) -> Proposal:
        """What followed the text's end in earlier requests."""
        return self._lookup.propose(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens."""
        if self._keep_reply:
            self._reply.append(np.array(tokens, np.int32))
        self._lookup.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: only text is kept here."""

    def close(self) -> None:
        """Hands the request's text to the history."""
        self._lookup.close()
        reply = np.concatenate(self._reply) if self._reply else np.empty(0, np.int32)
        self._reply = []
        self._history.add(self._prompt, reply)


class HistorySource:
    """Drafts from what earlier requests of this process said.

    Args:
        history: Where they are kept.
        prompts: Whether prompts join it.
        replies: Whether replies join it.
    """

    name = "history"
    level = "history"

    def __init__(self, history: History, prompts: bool = True, replies: bool = True) -> None:
        self.history = history
        self._prompts = prompts
        self._replies = replies

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> HistorySession:
        """Starts a request; references are the request's own and stay out of the history."""
        return HistorySession(self.history, prompt, self._prompts, self._replies)

    def open_siblings(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[HistorySession]:
        """Starts requests with one prompt, which joins the history once."""
        return [
            HistorySession(self.history, prompt, self._prompts and each == 0, self._replies)
            for each in range(count)
        ]

    def flush(self) -> None:
        """Waits until finished requests can be looked up."""
        self.history.flush()

    def close(self) -> None:
        """Keeps what waits, and stops the background thread."""
        self.history.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the history."""
        return self.history.nbytes


def _new_texts(segments: Segments, prompt: TokenArray, reply: TokenArray) -> list[TokenArray]:
    """What a request adds: the parts of the prompt that are not known, and the reply with what led to it."""
    from retrieval_draft.index._kernels import segment_match as kernels

    pieces: list[TokenArray] = []
    if len(prompt):
        rows = (
            np.stack([segment.row for segment in segments])
            if segments
            else np.empty((0, kernels.SEGMENT_FIELDS), np.int64)
        )
        lengths = np.empty(len(prompt), np.int32)
        kernels.match_lengths(rows, *match_state(len(segments)), prompt, lengths)
        # A position is known where the 32 tokens that end there are, or all that there are; what leads to a
        # new one is kept with it.
        enough = np.minimum(np.arange(len(prompt)) + 1, kernels.LONGEST)
        enough[:_UNTOLD] = 0
        fresh = np.concatenate((lengths < enough, [bool(len(reply))]))
        wanted = np.zeros(len(fresh) + kernels.LONGEST, bool)
        for place in np.flatnonzero(np.diff(fresh, prepend=False)):
            if fresh[place]:
                wanted[max(place - kernels.LONGEST + 1, 0) : place] = True
        wanted = (wanted[: len(fresh)] | fresh)[: len(prompt)]
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
        pieces = [prompt[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    if len(reply):
        if len(prompt):
            pieces[-1:] = [np.concatenate((*pieces[-1:], reply))]
        else:
            pieces.append(reply)
    return pieces


def _work(history: Callable[[], History | None]) -> None:
    """The background thread: runs until the history is closed or nobody holds it any more."""
    with suppress(OSError, AttributeError):  # leave the cores to whoever decodes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    while True:
        mine = history()
        if mine is None or not mine._serve():
            return
        del mine


_histories: WeakSet[History] = WeakSet()


def _after_fork() -> None:
    """The thread stays with the parent, and so does the folder: a child keeps its own texts in memory."""
    for history in _histories:
        history._changed = threading.Condition()
        history._worker = None
        history._busy = False
        history._waiting.clear()
        history._waiting_tokens = 0
        history._index = None
        history._stack = ExitStack()


@atexit.register
def _at_exit() -> None:
    """What waits is written before the process ends."""
    for history in list(_histories):
        if history._index is not None:
            history.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
