"""Earlier requests of this process, as segments that are merged and evicted in the background.

The text of a finished request becomes a small segment at once, and segments of similar size are merged into
larger ones, so there are never more than a few.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet, ref

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import DatastoreError, InvalidInputError, RetrievalDraftError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.index_folder import MANIFEST, IndexFolder, SegmentEntry
from retrieval_draft.index.segments.new_texts import new_texts
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import Segments, SegmentSession
from retrieval_draft.index.segments.segment_store import SegmentStore
from retrieval_draft.index.source import BaseSession, Proposal, TokenArray

__all__ = ["History", "HistorySource", "make_source"]

QUEUE_TOKENS = 1 << 22
"""Tokens that may wait for the background thread. Beyond it the oldest waiting request is dropped."""

_log = logging.getLogger("retrieval_draft")


class History:
    """Texts of finished requests.

    Args:
        vocabulary: Number of token ids.
        max_bytes: Limit of all segments together; the oldest are evicted.
        folder: Folder to save it in, or None to lose it at exit. One process at a time writes there;
            a second one reads its contents and keeps its own texts in memory.
        fingerprint: Of the tokenizer, which the folder is checked against.

    Attributes:
        dropped: Requests that were not kept because too many were waiting.
        failures: Times that the folder could not be written.
    """

    def __init__(
        self, vocabulary: int, max_bytes: int, folder: Path | None = None, fingerprint: str = ""
    ) -> None:
        if max_bytes < 1 << 20:
            raise InvalidInputError(f"max_bytes is {max_bytes}; a history needs at least {1 << 20}.")
        self._vocabulary = vocabulary
        self._pile = SegmentStore(vocabulary, max_bytes)
        self._entries: WeakKeyDictionary[Segment, SegmentEntry] = WeakKeyDictionary()
        self._waiting: deque[tuple[TokenArray, TokenArray]] = deque()
        self._waiting_tokens = 0
        self._busy = False
        self._closed = False
        self._worker: threading.Thread | None = None
        self._changed = threading.Condition()
        self._index: IndexFolder | None = None
        self._stack = ExitStack()
        self.dropped = 0
        self.failures = 0
        if folder is not None:
            self._attach(folder, fingerprint)
        _histories.add(self)

    @property
    def segments(self) -> Segments:
        """Oldest first; a tuple that never changes."""
        return self._pile.segments

    @property
    def num_tokens(self) -> int:
        """Tokens that can be looked up now."""
        return self._pile.num_tokens

    @property
    def evicted(self) -> int:
        """Tokens evicted to make room."""
        return self._pile.evicted

    @property
    def nbytes(self) -> int:
        """Bytes of all segments and of waiting requests."""
        return self._pile.nbytes + 4 * self._waiting_tokens

    def add(self, prompt: TokenArray, reply: TokenArray) -> None:
        """Adds a finished request; it can be looked up a little later. Never blocks.

        Args:
            prompt: int32, shape (n,). Only its new parts are kept, so that a long conversation, which is
                repeated with every turn, is stored once. May be empty.
            reply: int32, shape (m,). Kept whole, as the number of occurrences counts. May be empty.
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
        """Changes the limit in bytes; segments beyond it are evicted with the next request."""
        self._pile.max_bytes = max_bytes

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything added can be looked up.

        Returns:
            False after `timeout` seconds.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Adds waiting requests, and stops the background thread. Segments in memory stay usable."""
        if self._worker is not None:
            self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        self._stack.close()

    def _attach(self, folder: Path, fingerprint: str) -> None:
        """Maps a folder's segments, and keeps it open for writing where that is possible.

        Raises:
            DatastoreError: It holds other files, or is torn.
            TokenizerMismatchError: It belongs to another tokenizer.
        """
        try:
            index = IndexFolder.create(folder, fingerprint, self._vocabulary)
        except DatastoreError as error:
            if not isinstance(error.__cause__, OSError) or (folder / MANIFEST).exists():
                raise
            # The folder is missing and cannot be made: requests are served without it.
            _log.warning("The history is kept in memory only: %s", error.message)
            return
        try:
            self._stack.enter_context(index.locked())
        except DatastoreError as error:
            _log.warning("%s The history there is only read; new text stays in memory.", error.message)
        else:
            self._index = index
            index.sweep()
        self._pile = SegmentStore(self._vocabulary, self._pile.max_bytes, index.segments())
        self._entries.update(zip(self.segments, index.manifest.segments, strict=True))

    def _take(self) -> list[tuple[TokenArray, TokenArray]]:
        """Waits for requests, and takes all waiting ones."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout=1.0)
            taken = list(self._waiting)
            self._waiting.clear()
            self._waiting_tokens = 0
            self._busy = bool(taken)
            return taken

    def _ingest(self, taken: Sequence[tuple[TokenArray, TokenArray]]) -> None:
        """Adds requests, merges and evicts."""
        texts: list[TokenArray] = []
        for prompt, reply in taken:
            texts += new_texts(self.segments, prompt, reply)
        texts = [text[(text >= 0) & (text < self._vocabulary)] for text in texts]
        texts = [text for text in texts if len(text) > 1]
        if not texts:
            return
        self._pile.add(Segment.build(texts, self._vocabulary))  # merging may take a while
        while self._pile.compact():
            pass
        self._persist(self.segments)

    def _persist(self, segments: Segments) -> None:
        """Writes the segments in memory to the folder. A failure loses the copy on disk only."""
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
        """Runs one round of the background thread.

        Returns:
            True if another round may follow.
        """
        taken = self._take()
        self._pile.free_retired()
        if taken:
            try:
                self._ingest(taken)
            except Exception as error:  # a request's text is lost, the process continues
                self.failures += 1
                _log.warning("A request's text could not be added to the history: %r", error, exc_info=error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        return not (self._closed and not self._waiting)


class HistorySession(BaseSession):
    """Drafts from the history, and becomes part of it at its end."""

    def __init__(self, history: History, prompt: TokenArray, keep_prompt: bool, keep_reply: bool) -> None:
        self._history = history
        self._keep_reply = keep_reply
        self._prompt = np.array(prompt, np.int32) if keep_prompt else np.empty(0, np.int32)
        self._reply: list[TokenArray] = []
        self._lookup = SegmentSession(lambda: history.segments, prompt, "history", "history")

    def propose(self, budget: int) -> Proposal:
        """The tokens after the text's end in earlier requests, as a tree."""
        return self._lookup.propose(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        if self._keep_reply:
            self._reply.append(np.array(tokens, np.int32))
        self._lookup.observe(tokens)

    def close(self) -> None:
        """Adds the request's text to the history."""
        self._lookup.close()
        reply = np.concatenate(self._reply) if self._reply else np.empty(0, np.int32)
        self._reply = []
        self._history.add(self._prompt, reply)


class HistorySource:
    """Drafts from the texts of earlier requests of this process.

    Args:
        history: The store of their texts.
        prompts: Whether prompts join it.
        replies: Whether replies join it.
    """

    name = "history"
    level = "history"

    def __init__(self, history: History, prompts: bool = True, replies: bool = True) -> None:
        self.history = history
        self._prompts = prompts
        self._replies = replies

    def keep(self, prompt: TokenArray, reply: TokenArray) -> None:
        """Adds the kept parts of a request that was not opened here: int32, shape (n,) and (m,)."""
        nothing = np.empty(0, np.int32)
        self.history.add(prompt if self._prompts else nothing, reply if self._replies else nothing)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> HistorySession:
        """Starts a request with `prompt`, int32, shape (length,); references stay out of the history."""
        return HistorySession(self.history, prompt, self._prompts, self._replies)

    def open_parallel(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[HistorySession]:
        """Starts requests with one prompt, int32, shape (length,), which is added to the history once."""
        return [
            HistorySession(self.history, prompt, self._prompts and each == 0, self._replies)
            for each in range(count)
        ]

    def flush(self) -> None:
        """Waits until finished requests can be looked up."""
        self.history.flush()

    def close(self) -> None:
        """Adds waiting requests, and stops the background thread."""
        self.history.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the history."""
        return self.history.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> HistorySource:
    """A source over earlier requests, kept in the configured folder."""
    folder = None if config.history_folder is None else Path(config.history_folder)
    history = History(stores.vocabulary, config.history_bytes, folder, stores.fingerprint)
    return HistorySource(history, config.history_prompts, config.history_replies)


def _work(history: Callable[[], History | None]) -> None:
    """The background thread: runs until the history is closed or garbage."""
    with suppress(OSError, AttributeError):  # leave the cores to decoding
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    while True:
        mine = history()
        if mine is None or not mine._serve():
            return
        del mine


_histories: WeakSet[History] = WeakSet()


def _after_fork() -> None:
    """Resets histories in a forked child: thread and folder are the parent's, texts stay in memory only."""
    for history in _histories:
        history._changed = threading.Condition()
        history._pile.after_fork()
        history._worker = None
        history._busy = False
        history._waiting.clear()
        history._waiting_tokens = 0
        history._index = None
        history._stack = ExitStack()


@atexit.register
def _at_exit() -> None:
    """Writes waiting requests before the process ends."""
    for history in list(_histories):
        if history._index is not None:
            history.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
