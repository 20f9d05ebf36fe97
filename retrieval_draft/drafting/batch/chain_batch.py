"""Chains for many requests at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval_draft._settings import check_range
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.batch.counts import ChainCounts
from retrieval_draft.drafting.batch.lookups import Lookups
from retrieval_draft.drafting.batch.segment_table import SegmentTable
from retrieval_draft.drafting.batch.slots import Slots
from retrieval_draft.drafting.calibration import MEMORY, PRIOR, REQUEST_RATE, Calibration
from retrieval_draft.drafting.kept_calibration import (
    FleetCalibration,
    calibration_file,
    keep_calibration,
    load_calibration,
)
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index import suffix_automaton
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments import segment_session
from retrieval_draft.index.source import CONTEXT, DraftSource, NodeLogits, TokenArray, checked_ids

__all__ = ["MAX_CHAIN", "ChainBatch"]

NEEDED = 0.05
"""Probability below which a source's guess is not considered."""

SAMPLE = 8
"""Occurrences read for one context in segments: a chain needs the likeliest continuation, not all."""

MAX_CHAIN = 256
"""Limit of a chain, for which each session has 140 KB."""

THREADED = 16
"""Rows from which on a second thread pays."""


class ChainBatch:
    """Sessions that are drafted for together, each a chain of tokens a step.

    The sources, fusion and calibration of `Proposer`, for engines that verify one chain for each of many
    requests. At each node of a chain every source proposes next tokens, their estimates are mixed as in
    `drafting.fusion`, and the chain continues with the most probable token. A step is one call for all rows:
    first calibration and the adjacency matrix learn from the emitted tokens of all rows, in their order; then
    each row is looked up and proposed for, independently. So results depend on the calls and their order, not
    on threads or time. Only the row itself drafts from its own text.

    Every method may be called from any thread; calls run one after the other. Work that grows with the rows
    runs without the GIL.

    Args:
        stores: Data to draft from besides the requests.
        config: The drafting configuration; its `sources` without siblings. None for the defaults.
        max_chain: The longest chain, 1 to 256.
        sources: Made sources to use, such as those of a `Proposer`; None to make them from `config`.
        calibration: A copy of the batch's own by default; a given one is updated in place.
        threads: Number that propose at once, in batches of 16 rows or more.

    Attributes:
        counts: Of all sessions.
        calibration: Learned weights of the sources.

    Raises:
        InvalidInputError: `max_chain` or `threads` is out of range, or the configuration's method cannot
            draft chains.

    Example:
        batch = ChainBatch(DraftStores(vocabulary=32000))
        session = batch.open(prompt)
        tokens, lengths, path_probs = batch.step([session], first_token, [1])
        batch.close(session)
    """

    def __init__(
        self,
        stores: DraftStores,
        config: DraftConfig | None = None,
        *,
        max_chain: int = 16,
        sources: Sequence[DraftSource] | None = None,
        calibration: Calibration | None = None,
        threads: int = 1,
    ) -> None:
        check_range("max_chain", max_chain, 1, MAX_CHAIN)
        check_range("threads", threads, 1, 64)
        self.config = DraftConfig() if config is None else config
        if self.config.method not in ("calibrated", "none"):
            raise InvalidInputError(
                f"The method {self.config.method!r} drafts no chains for batches.",
                "Choose calibrated or none.",
            )
        from retrieval_draft.drafting.batch._kernels.candidates import MOST

        self.stores = stores
        self.counts = ChainCounts()
        self.max_chain = max_chain
        self._owned = sources is None
        self._lookups = Lookups(
            make_sources(self.config, stores) if sources is None else sources, stores.vocabulary
        )
        kept = calibration_file(self.config)
        self.calibration = load_calibration(kept) if calibration is None else calibration
        is_new = calibration is None and (kept is None or not kept.exists())
        self._fleet = FleetCalibration(stores.shared if self._owned else None, is_new)
        self._slots = Slots(max_chain, MOST, self._lookups.used.bit_count())
        self._table = SegmentTable(self._lookups.supplies)
        self._lock = threading.RLock()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "retrieval_draft chains") if threads > 1 else None
        self._stamp = 0
        self._automaton_params = np.array(
            [suffix_automaton.ESCAPE, suffix_automaton.ORDER_CAP, suffix_automaton.RECENCY], np.float64
        )
        self._segment_params = np.array(
            [segment_session.ESCAPE, segment_session.ORDER_CAP, segment_session.GAIN, SAMPLE], np.float64
        )

    def __len__(self) -> int:
        """Sessions that are open."""
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes held: by sessions and lookups, and by the sources."""
        sources = sum(source.nbytes for source in self._lookups.sources)
        return self._slots.nbytes + self._table.nbytes + sources

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> int:
        """Starts a session.

        Args:
            prompt: int32, shape (length,). All of the text so far.
            references: int32, shape (length,) each. Texts that the reply may quote.

        Returns:
            Its id. No id is used twice.

        Raises:
            InvalidInputError: The prompt is empty, or an id lies outside the vocabulary.
        """
        text = checked_ids(prompt, "The prompt", self.stores.vocabulary)
        if not len(text):
            raise InvalidInputError("The prompt is empty.", "Pass one token at least, such as the bos token.")
        others = [checked_ids(each, "A reference", self.stores.vocabulary) for each in references]
        with self._lock:
            self._fleet.exchange(self.calibration)
            session = self._slots.open(text, others, self._lookups.request)
            self._table.fit(self._slots.capacity)
            slot = self._slots.slot(session)
            self._table.locate(slot, self._slots.tail[slot])
            self.counts.requests += 1
        return session

    def step(
        self,
        ids: ArrayLike,
        new_tokens: ArrayLike,
        counts: ArrayLike,
        max_tokens: ArrayLike | None = None,
        min_prob: float = 0.05,
    ) -> tuple[TokenArray, NDArray[np.int32], NDArray[np.float32]]:
        """Appends the emitted tokens of each row, and proposes the next ones.

        Args:
            ids: int64, shape (rows,). Sessions, each once.
            new_tokens: int32, shape (total,). Tokens that each row emitted since its last step, row after
                row.
            counts: int32, shape (rows,). Number of new tokens of each row; 0 only proposes.
            max_tokens: The longest chain, of all rows or of each, shape (rows,); 0 only appends. None for
                `max_chain`, the limit of all chains.
            min_prob: Smallest path probability of a chain's node.

        Returns:
            int32, shape (rows, max_chain), the chains, -1 after each; int32, shape (rows,), their lengths;
            float32, shape (rows, max_chain), P(this token and all before it are accepted), 0 after each.

        Raises:
            InvalidInputError: A session is not open or comes twice, shapes do not fit, or an id lies outside
                the vocabulary. Nothing has changed then.
        """
        rows = np.ascontiguousarray(ids, np.int64)
        sizes = np.ascontiguousarray(counts, np.int32)
        tokens = checked_ids(new_tokens, "What was emitted", self.stores.vocabulary)
        if rows.ndim != 1 or sizes.shape != rows.shape:
            raise InvalidInputError(
                f"ids has shape {rows.shape} and counts {sizes.shape}; they must be one row each, and alike."
            )
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=starts[1:])
        if starts[-1] != len(tokens) or (len(sizes) and sizes.min() < 0):
            raise InvalidInputError(f"counts sums to {starts[-1]}, but there are {len(tokens)} new tokens.")
        limits = self._limits(max_tokens, len(rows))
        with self._lock:
            self._take_in(rows, sizes, tokens, starts)
            return self._propose(rows, limits, float(min_prob))

    def close(self, session: int, *, finished: bool = True, share: str | None = None) -> None:
        """Ends a session: adds its text to the history, and, if finished, to the shared store.

        Args:
            session: Its id.
            finished: False where the request was aborted: other servers learn nothing of it then.
            share: Parts of it that other servers may learn: "none", "reply" or "all"; None for the store's
                default.

        Raises:
            InvalidInputError: The session is not open, or `share` is something else.
        """
        with self._lock:
            slot = self._slot(session)
            prompt, reply = self._slots.text(slot)
            self._lookups.keep(prompt.copy(), reply.copy(), finished, share)
            self._slots.close(slot)

    def text(self, session: int) -> TokenArray:
        """int32: a copy of all of a session's text so far, the prompt included.

        Raises:
            InvalidInputError: The session is not open.
        """
        with self._lock:
            return np.concatenate(self._slots.text(self._slot(session)))

    def warm_up(self) -> None:
        """Compiles the kernels of the first step; takes milliseconds where they are cached on disk."""
        config = DraftConfig(sources=("automaton", "adjacency", "history"), adjacency_rows=16)
        spare = ChainBatch(DraftStores(vocabulary=16), config)
        text = np.array([5, 6, 7, 8, 9, 5, 6, 7, 8], np.int32)
        spare.close(spare.open(text))
        spare.flush()
        session = spare.open(text)
        for token in (9, 5):
            spare.step([session], [token], [1])
        spare.shut_down()
        if self._lookups.store is not None:
            self._lookups.store.wait_ready()

    def flush(self) -> None:
        """Waits until finished sessions' texts can be drafted from, and saves the calibration."""
        for source in self._lookups.sources:
            source.flush()
        self._keep()

    def shut_down(self) -> None:
        """Aborts open sessions, writes pending data, and stops background threads."""
        with self._lock:
            for slot in self._slots.used:
                self._slots.close(int(slot))
        if self._pool is not None:
            self._pool.shutdown()
        if self._owned:
            for source in self._lookups.sources:
                source.close()
        self._keep()

    def _keep(self) -> None:
        """Saves the calibration beside the history, unless another object owns it."""
        if self._owned:
            keep_calibration(self.calibration, calibration_file(self.config))

    def _take_in(
        self, rows: NDArray[np.int64], sizes: NDArray[np.int32], tokens: TokenArray, starts: NDArray[np.int64]
    ) -> None:
        from retrieval_draft.drafting.batch._kernels import learn

        slots, calibration = self._slots, self.calibration
        self._stamp += 1
        wrong, why, tight = learn.check_rows(rows, slots.fields, starts, self._stamp)
        if wrong != learn.ALL_FIT:
            raise InvalidInputError(
                f"Row {wrong}: session {rows[wrong]} " + ("comes twice." if why else "is not open.")
            )
        if tight:
            slots.make_room(rows & slots.mask, np.asarray(sizes, np.int64))
        # New segments are searched for the texts as they were, then all lookups advance to the new ends.
        self._table.refresh(slots)
        counts = self.counts
        counts.steps += 1
        counts.rows += len(rows)
        if not len(tokens):
            return
        contexts = np.empty((len(tokens), CONTEXT), np.int32)
        drafted, accepted = learn.learn_rows(
            rows, starts, tokens, slots.fields, slots.nodes, slots.evidence, slots.chosen,
            calibration.weights, calibration.parameters, slots.request, slots.occurrences,
            calibration.expected, calibration.accepted, calibration.rate, REQUEST_RATE, MEMORY,
            calibration.switches, calibration.sharpness, contexts,
        )  # fmt: skip
        counts.tokens += len(tokens)
        counts.drafted += drafted
        counts.accepted += accepted
        if self._lookups.matrix is not None:
            ones = np.ones((len(tokens), 1), np.float32)
            self._lookups.matrix.learn(NodeLogits(contexts, tokens[:, None], ones))

    def _propose(
        self, rows: NDArray[np.int64], limits: NDArray[np.int32], min_prob: float
    ) -> tuple[TokenArray, NDArray[np.int32], NDArray[np.float32]]:
        out = (
            np.empty((len(rows), self.max_chain), np.int32),
            np.empty(len(rows), np.int32),
            np.empty((len(rows), self.max_chain), np.float32),
        )
        full = np.empty(len(rows), np.uint8)
        with self._lookups.reading():
            if self._share(rows, limits, min_prob, full, out):
                again = np.flatnonzero(full)
                for row in again:
                    self._slots.insert(int(rows[row] & self._slots.mask))
                part = tuple(array[again] for array in out)
                self._run(rows[again], limits[again], min_prob, full[again], part, 0, len(again))
                for array, values in zip(out, part, strict=True):
                    array[again] = values
        return out

    def _share(self, rows: Any, limits: Any, min_prob: float, full: Any, out: Any) -> int:
        """Proposes for all rows, on several threads where that pays. Returns the number that did not fit."""
        count = len(rows)
        if self._pool is None or count < THREADED:
            return self._run(rows, limits, min_prob, full, out, 0, count)
        edges = [count * part // self._threads for part in range(self._threads + 1)]
        others = [
            self._pool.submit(self._run, rows, limits, min_prob, full, out, begin, end)
            for begin, end in pairwise(edges[1:])
        ]
        own = self._run(rows, limits, min_prob, full, out, 0, edges[1])
        return own + sum(other.result() for other in others)

    def _run(
        self, rows: Any, limits: Any, min_prob: float, full: Any, out: Any, first: int, last: int
    ) -> int:
        from retrieval_draft.drafting.batch._kernels import propose

        slots, table, calibration, lookups = self._slots, self._table, self.calibration, self._lookups
        kernel: Any = propose.propose_rows
        misfits: int = kernel(
            rows, first, last, limits, min_prob, slots.fields, slots.nodes, slots.evidence, slots.chosen,
            lookups.columns, self._automaton_params, *lookups.arrays, table.rows, table.starts,
            lookups.group_columns, self._segment_params, table.chain, table.longest, slots.tail,
            lookups.used, calibration.weights, calibration.parameters, slots.request, slots.occurrences,
            calibration.expected, calibration.accepted, PRIOR, NEEDED, full, *out,
        )  # fmt: skip
        return misfits

    def _limits(self, max_tokens: ArrayLike | None, rows: int) -> NDArray[np.int32]:
        if max_tokens is None:
            return np.full(rows, self.max_chain, np.int32)
        limits = np.asarray(max_tokens)
        if limits.shape not in ((), (rows,)) or limits.dtype.kind not in "iu":
            raise InvalidInputError(
                f"max_tokens has shape {limits.shape} and dtype {limits.dtype}; it must be one number, or "
                f"{rows}."
            )
        clipped: NDArray[np.int32] = np.clip(limits, 0, self.max_chain).astype(np.int32)
        return np.ascontiguousarray(np.broadcast_to(clipped, rows))

    def _slot(self, session: int) -> int:
        slot = self._slots.slot(int(session))
        if slot < 0:
            raise InvalidInputError(f"Session {session} is not open.", "Open another one.")
        return slot
