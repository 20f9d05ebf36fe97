"""n-gram adjacency matrix: the target model's predictions after the last 1, 2, 3 and 4 tokens.

Token Recycling (arXiv:2408.08696) keeps the last top-8 of every token; STAND (arXiv:2506.04708) averages
n-gram rows. Here rows of four orders are averaged, filled from every verified node, accepted or not, and
blended for a proposal, together with the tokens that are frequent in any context. Rows outlive the process in
the history's folder, and what was learned at accepted tokens goes to other servers with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._forks import lock_for_moments
from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.config import DraftConfig
from retrieval_draft.index._workspace import Workspace
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.frequent import KEPT, FrequentTokens
from retrieval_draft.index.matrix_rows import MatrixRows
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray

if TYPE_CHECKING:  # their modules import this one
    from retrieval_draft.index.matrix_file import KeptMatrix
    from retrieval_draft.index.observations import Observations
    from retrieval_draft.index.store.store import SharedStore

__all__ = ["MATRIX", "AdjacencyMatrix", "AdjacencySession", "AdjacencySource", "make_source"]

MATRIX = "matrix.rows"
"""Name of the matrix's file in the history's folder and in snapshots."""

BACKOFF = (300.0, 30.0, 16.0, 8.0, 4.0)
"""A row of order o seen v times takes v / (v + BACKOFF[o]) of the probability that reaches it; order 0 holds
the tokens frequent in any context, with the sum of their counts for visits. On traces of two models, halving
or doubling them changes the result by less than 0.5%, a tenth accepts 1 to 3% fewer tokens, and leaving out
order 0 4 to 10% fewer."""

LINE = 16
"""Words of four bytes in a cache line."""

CLOCK = 1 << 31
"""Steps after which the time of a row's last write begins anew; then some younger rows are evicted first."""

VISITS = 16
"""Observations after which a row's mean becomes a moving average."""

_PART = 1 << 13
"""Rows that are copied or merged while proposals wait."""


class AdjacencyMatrix:
    """A fixed number of rows, each the averaged top-k next tokens of one n-gram.

    Args:
        rows: Rows, rounded up to a power of two. The least recently written of a window of eight is evicted.
        top_k: Next tokens a row keeps.
        cap: Observations after which a row's mean becomes a moving average.

    Example:
        learn context [-1, -1, 5, 7] -> tokens [9, 4], probs [.6, .3]; then after "5 7" the row of order 2
        and after any 7 the row of order 1 propose 9 and 4; after other tokens they are guessed as frequent
        ones, far less probable. A matrix that has learned nothing proposes nothing.
    """

    def __init__(self, rows: int = 262144, top_k: int = 8, cap: int = VISITS) -> None:
        from retrieval_draft.index._kernels import adjacency

        self._kernels: Any = adjacency
        self._row_kernels = LazyKernels("retrieval_draft.index._kernels.rows")
        size = 1 << max(4, (int(rows) - 1).bit_length())
        self.top_k = top_k
        self._cap = cap
        # A step visits dozens of rows all over the memory. So a row has two parts, of a cache line each
        # for eight tokens: what is read to find it, beside its neighbours', and what it holds.
        self._found_by: NDArray[np.int32] = np.zeros((size, 4), np.int32)
        self._keys = self._found_by[:, :2].view(np.uint64)[:, 0]
        self._used, self._visits = self._found_by[:, 2], self._found_by[:, 3]
        memory: NDArray[np.int32] = np.zeros(size * 2 * top_k + LINE, np.int32)
        begin = -memory.ctypes.data // 4 % LINE
        self._rows = memory[begin : begin + size * 2 * top_k].reshape(size, 2 * top_k)
        self._tokens, self._probs = self._rows[:, :top_k], self._rows[:, top_k:].view(np.float32)
        self._backoff = np.array(BACKOFF, np.float64)
        self._frequent = FrequentTokens()
        self._clock = 0
        # The kernels run without the GIL, and a server drafts from several threads.
        self._lock = lock_for_moments()

    @property
    def nbytes(self) -> int:
        """Bytes held: the rows, and 8 for each token id that was seen."""
        return self._found_by.nbytes + self._rows.nbytes + self._frequent.nbytes

    @property
    def filled(self) -> int:
        """Rows in use."""
        return int(np.count_nonzero(self._keys))

    @property
    def clock(self) -> int:
        """Time of the last write; another number after each."""
        return self._clock

    @property
    def lock(self) -> Lock:
        """Lock to hold while a kernel reads `arrays`."""
        return self._lock

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Keys, visits, tokens, probabilities and back-off constants, for kernels."""
        return self._keys, self._visits, self._tokens, self._probs, self._backoff

    def learn(self, logits: NodeLogits) -> None:
        """Averages the target's predictions into the rows of orders 1 to 4 of each context; counts them."""
        tokens, probs = np.array(logits.top_tokens, np.int32), np.array(logits.top_probs, np.float32)
        with self._lock:
            self._frequent.add(tokens, probs)
            self._average(np.array(logits.contexts, np.int32), tokens, probs)

    def _average(
        self, contexts: TokenArray, tokens: TokenArray, probs: np.ndarray[Any, np.dtype[np.float32]]
    ) -> None:
        self._clock = (self._clock + 1) % CLOCK
        self._kernels.learn(
            self._keys, self._used, self._visits, self._tokens, self._probs, contexts, tokens, probs,
            self._cap, self._clock,
        )  # fmt: skip

    def rows(self, least: int = 1, begin: int = 0, end: int | None = None) -> MatrixRows:
        """A copy of the rows with `least` observations or more, in the order of their slots.

        Copied part by part, so that no proposal waits long; each row is whole.

        Args:
            least: Observations.
            begin: First slot.
            end: Slot after the last one; None for all.
        """
        stop = len(self._keys) if end is None else min(end, len(self._keys))
        parts: list[MatrixRows] = []
        for first in range(begin, stop, _PART):
            part = slice(first, min(first + _PART, stop))
            with self._lock:
                found = self._keys[part] != 0
                found &= (self._visits[part] >= least) & (self._tokens[part, 0] >= 0)
                found = np.flatnonzero(found) + first
                parts.append(
                    MatrixRows(
                        self._keys[found],
                        self._visits[found],
                        self._used[found],
                        self._tokens[found],
                        self._probs[found],
                    )
                )
        rows = MatrixRows.join(parts)
        np.minimum(rows.probs, np.float32(1.0), out=rows.probs)  # a mean of ones may be more by its last bit
        return rows

    def slot(self, key: np.uint64) -> int:
        """The slot of a row, by its key; `NO_ROW` where there is none."""
        with self._lock:
            return int(self._kernels.find_row(self._keys, key))

    def merge(self, rows: MatrixRows) -> None:
        """Merges rows that were learned elsewhere: counts add up, means are weighted by them.

        In any order of merges the means are the same up to rounding, while a row has at most `top_k` next
        tokens and its count does not reach its limit.

        Args:
            rows: Checked ones.
        """
        for begin in range(0, len(rows), _PART):
            part = rows.only(np.arange(begin, min(begin + _PART, len(rows))))
            with self._lock:
                self._clock = max((self._clock + 1) % CLOCK, int(part.times.max()))
                times = np.where(part.times > 0, part.times, self._clock).astype(np.int32)
                self._row_kernels.merge(
                    self._keys, self._used, self._visits, self._tokens, self._probs,
                    part.keys, part.visits, part.tokens, part.probs, times, self._cap,
                )  # fmt: skip

    def forget(self, text: TokenArray) -> int:
        """Empties the rows of every n-gram of a text, int32, shape (n,), learned from it or elsewhere.

        Returns:
            Rows emptied.
        """
        padded = np.concatenate((np.full(CONTEXT - 1, -1, np.int32), np.asarray(text, np.int32)))
        contexts = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT)
        with self._lock:
            return int(
                self._row_kernels.forget(
                    self._keys, self._visits, self._tokens, self._probs, np.ascontiguousarray(contexts)
                )
            )

    def empty(self, rows: MatrixRows) -> None:
        """Empties rows, by their keys."""
        with self._lock:
            self._row_kernels.empty(self._keys, self._visits, rows.keys)

    def frequent(self) -> tuple[TokenArray, NDArray[np.float32]]:
        """Order 0: the ids that were seen, and their counts."""
        with self._lock:
            ids = np.flatnonzero(self._frequent.counts).astype(np.int32)
            return ids, self._frequent.counts[ids]

    def merge_frequent(self, ids: TokenArray, counts: NDArray[np.float32]) -> None:
        """Adds counts to those of order 0: int32 and float32, shape (n,) each."""
        if len(ids):
            with self._lock:
                self._frequent.add(ids[:, None], counts[:, None])

    def row(self, context: TokenArray) -> tuple[TokenArray, np.ndarray[Any, np.dtype[np.float32]], int]:
        """The row of exactly these tokens.

        Args:
            context: int32, shape (order,), 1 to 4 tokens.

        Returns:
            Next tokens and probabilities, best first, and observations in the row; empty and 0 if there is
            none.
        """
        padded = np.full(CONTEXT, -1, np.int32)
        padded[CONTEXT - len(context) :] = context
        row = self._kernels.find_context(self._keys, padded, len(context))
        if row == self._kernels.NO_ROW:
            return np.empty(0, np.int32), np.empty(0, np.float32), 0
        size = int(np.count_nonzero(self._tokens[row] >= 0))
        return self._tokens[row, :size].copy(), self._probs[row, :size].copy(), int(self._visits[row])

    def propose(self, tail: TokenArray, budget: int, workspace: Workspace) -> Proposal:
        """The `budget` most probable nodes after `tail`. Changes nothing.

        Args:
            tail: int32, shape (4,). The text's last tokens, oldest first, -1 where there are fewer.
            budget: The most nodes to return.
            workspace: Scratch made by `workspace`, one for each thread.
        """
        found = workspace.fit(budget)
        with self._lock:
            size = self._kernels.propose(
                self._keys,
                self._visits,
                self._tokens,
                self._probs,
                self._backoff,
                self._frequent.counts,
                self._frequent.tokens,
                self._frequent.total,
                tail,
                budget,
                *workspace.scratch,
                *found,
            )
        return found.proposal(size, "adjacency", "request")

    def workspace(self) -> Workspace:
        """Scratch for `propose`."""
        return Workspace(fields=3 + CONTEXT, children=CONTEXT * self.top_k + KEPT)


class AdjacencySession:
    """One request's context in the matrix: its last four tokens."""

    def __init__(
        self,
        matrix: AdjacencyMatrix,
        prompt: TokenArray,
        kept: KeptMatrix | None = None,
        told: Observations | None = None,
    ) -> None:
        self._matrix = matrix
        self._kept, self._told = kept, told
        self._workspace = matrix.workspace()
        self._tail = np.full(CONTEXT, -1, np.int32)
        self._advance(prompt[-CONTEXT:])

    def propose(self, budget: int) -> Proposal:
        """The model's earlier predictions after the same tokens, as a tree."""
        return self._matrix.propose(self._tail, budget, self._workspace)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), to the context. The matrix learns in `learn`."""
        self._advance(tokens)
        if self._told is not None:
            self._told.observe(tokens)

    def _advance(self, tokens: TokenArray) -> None:
        size = min(len(tokens), CONTEXT)
        if size:
            self._tail[: CONTEXT - size] = self._tail[size:]
            self._tail[CONTEXT - size :] = tokens[-size:]

    def learn(self, logits: NodeLogits) -> None:
        """Fills the rows of every verified node."""
        self._matrix.learn(logits)
        if self._told is not None:
            self._told.learn(logits)

    def close(self) -> None:
        """The rows stay for later requests."""
        if self._kept is not None:
            self._kept.save_sometimes()


class AdjacencySource:
    """Drafts from the target's own predictions at earlier nodes.

    Args:
        rows: Rows of the matrix.
        top_k: Next tokens a row keeps.
        file: File to keep it in; None to lose it at exit.
        fingerprint: Of the tokenizer, which the file is checked against.
        vocabulary: Number of token ids.
        shared: Store whose servers learn from each other, or None.
    """

    name = "adjacency"
    level = "request"

    def __init__(
        self,
        rows: int = 262144,
        top_k: int = 8,
        *,
        file: Path | None = None,
        fingerprint: str = "",
        vocabulary: int = 0,
        shared: SharedStore | None = None,
    ) -> None:
        self.matrix = AdjacencyMatrix(rows, top_k)
        self._kept: KeptMatrix | None = None
        self.store = shared
        if file is not None:
            from retrieval_draft.index.matrix_file import KeptMatrix

            self._kept = KeptMatrix(self.matrix, file, fingerprint, vocabulary)
        if shared is not None:
            shared.learned.attach(self.matrix)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> AdjacencySession:
        """Starts at the end of the prompt, int32, shape (length,); references have no predictions."""
        told = None if self.store is None else self.store.observe(prompt)
        return AdjacencySession(self.matrix, prompt, self._kept, told)

    def flush(self) -> None:
        """Saves what was learned; it can be looked up at once."""
        if self._kept is not None:
            self._kept.save()

    def close(self) -> None:
        """Saves what was learned."""
        self.flush()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> AdjacencySource:
    """A source over a matrix of the configured size, kept beside the history where all of that is kept."""
    folder = config.history_folder if config.history_prompts and config.history_replies else None
    return AdjacencySource(
        config.adjacency_rows,
        config.top_k,
        file=None if folder is None else Path(folder, MATRIX),
        fingerprint=stores.fingerprint,
        vocabulary=stores.vocabulary,
        shared=stores.shared,
    )
