"""n-gram adjacency matrix: the target model's predictions after the last 1, 2, 3 and 4 tokens.

Token Recycling (arXiv:2408.08696) keeps the last top-8 of every token; STAND (arXiv:2506.04708) averages
n-gram rows. Here rows of four orders are averaged, filled from every verified node, accepted or not, and
blended for a proposal, together with the tokens that are frequent in any context.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.config import DraftConfig
from retrieval_draft.index._workspace import Workspace
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.frequent import KEPT, FrequentTokens
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray

__all__ = ["AdjacencyMatrix", "AdjacencySession", "AdjacencySource", "make_source"]

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


class AdjacencyMatrix:
    """A fixed number of rows, each the averaged top-k next tokens of one n-gram.

    Args:
        rows: Rows, rounded up to a power of two. The least recently written of a window of eight is evicted.
        top_k: Next tokens a row keeps.

    Example:
        learn context [-1, -1, 5, 7] -> tokens [9, 4], probs [.6, .3]; then after "5 7" the row of order 2
        and after any 7 the row of order 1 propose 9 and 4; after other tokens they are guessed as frequent
        ones, far less probable. A matrix that has learned nothing proposes nothing.
    """

    def __init__(self, rows: int = 262144, top_k: int = 8) -> None:
        from retrieval_draft.index._kernels import adjacency

        self._kernels: Any = adjacency
        size = 1 << max(4, (int(rows) - 1).bit_length())
        self.top_k = top_k
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
            self._clock = (self._clock + 1) % CLOCK
            self._frequent.add(tokens, probs)
            self._kernels.learn(
                self._keys,
                self._used,
                self._visits,
                self._tokens,
                self._probs,
                np.array(logits.contexts, np.int32),
                tokens,
                probs,
                VISITS,
                self._clock,
            )

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
        workspace.fit(budget)
        tokens = np.empty(budget, np.int32)
        parents = np.empty(budget, np.int32)
        probs = np.empty(budget, np.float32)
        lengths = np.empty(budget, np.int32)
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
                workspace.ints,
                workspace.floats,
                workspace.bits,
                workspace.heap,
                tokens,
                parents,
                probs,
                lengths,
            )
        return Proposal(tokens[:size], parents[:size], probs[:size], lengths[:size], "adjacency", "request")

    def workspace(self) -> Workspace:
        """Scratch for `propose`."""
        return Workspace(fields=3 + CONTEXT, children=CONTEXT * self.top_k + KEPT)


class AdjacencySession:
    """One request's context in the matrix: its last four tokens."""

    def __init__(self, matrix: AdjacencyMatrix, prompt: TokenArray) -> None:
        self._matrix = matrix
        self._workspace = matrix.workspace()
        self._tail = np.full(CONTEXT, -1, np.int32)
        self.observe(prompt[-CONTEXT:])

    def propose(self, budget: int) -> Proposal:
        """The model's earlier predictions after the same tokens, as a tree."""
        return self._matrix.propose(self._tail, budget, self._workspace)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), to the context. The matrix learns in `learn`."""
        size = min(len(tokens), CONTEXT)
        if size:
            self._tail[: CONTEXT - size] = self._tail[size:]
            self._tail[CONTEXT - size :] = tokens[-size:]

    def learn(self, logits: NodeLogits) -> None:
        """Fills the rows of every verified node."""
        self._matrix.learn(logits)

    def close(self) -> None:
        """The rows stay for later requests."""


class AdjacencySource:
    """Drafts from the target's own predictions at earlier nodes.

    Args:
        rows: Rows of the matrix.
        top_k: Next tokens a row keeps.
    """

    name = "adjacency"
    level = "request"

    def __init__(self, rows: int = 262144, top_k: int = 8) -> None:
        self.matrix = AdjacencyMatrix(rows, top_k)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> AdjacencySession:
        """Starts at the end of the prompt, int32, shape (length,); references have no predictions."""
        return AdjacencySession(self.matrix, prompt)

    def flush(self) -> None:
        """Does nothing: learned predictions can be looked up at once."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> AdjacencySource:
    """A source over a matrix of the configured size."""
    return AdjacencySource(config.adjacency_rows, config.top_k)
