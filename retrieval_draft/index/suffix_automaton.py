"""Suffix automaton of one request's text, which grows token by token and proposes earlier continuations.

Online construction after Blumer et al. (1985), as used for drafting by SAM-Decoding (arXiv:2411.10666);
counts, recency and the tree over the whole suffix-link chain are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index._workspace import Workspace
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import BaseSession, BaseSource, Proposal, TokenArray

__all__ = ["AutomatonSession", "AutomatonSource", "SuffixAutomaton", "make_source"]

ESCAPE = 3.0
ORDER_CAP = 10
RECENCY = 0.5
"""Blend of contexts: PPM-C's escape times ESCAPE, at most ORDER_CAP orders for one state, RECENCY of a
count more for the continuation seen last. On replies of two models the result moves by less than 0.5% between
escapes of 2 and 4, caps of 10 and 16 and recencies of 0 and 1; a cap of 6 costs up to 2% where text loops."""

GROWTH = 1.125
"""Arrays grow by an eighth, not by half or double: a long context is short of memory."""


class SuffixAutomaton:
    """All substrings of a text, with the counts of the tokens after each.

    Args:
        capacity: Tokens to make room for at once. It grows as needed.

    Example:
        insert 7 8 9 4 7 8; the longest suffix that occurred before is "7 8", match length 2;
        propose(2)  ->  tokens [9, 4], parents [-1, 0]
    """

    def __init__(self, capacity: int = 256) -> None:
        from retrieval_draft.index._kernels import automaton

        self._kernels: Any = automaton
        room = max(int(capacity), 16)
        self._states: NDArray[np.int32] = np.empty((room * 3 // 2, automaton.STATE_FIELDS), np.int32)
        self._edges: NDArray[np.int32] = np.empty((room * 9 // 4, automaton.EDGE_FIELDS), np.int32)
        self._table: NDArray[np.int32] = np.full(64, -1, np.int32)
        self._meta: NDArray[np.int64] = np.zeros(automaton.META_FIELDS, np.int64)
        self._states[0] = (-1, 0, 0, -1, -1, 0)
        self._meta[automaton.STATES] = 1
        self._params = np.array([ESCAPE, ORDER_CAP, RECENCY], np.float64)

    def __len__(self) -> int:
        """Tokens inserted, text ends included."""
        return int(self._meta[self._kernels.TOKENS])

    @property
    def num_states(self) -> int:
        """States, the root included. Less than twice the tokens."""
        return int(self._meta[self._kernels.STATES])

    @property
    def num_edges(self) -> int:
        """Edges. Less than three times the tokens."""
        return int(self._meta[self._kernels.EDGES])

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._states.nbytes + self._edges.nbytes + self._table.nbytes + self._meta.nbytes

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """States, edges, table and meta, for kernels. Insertion replaces those that were too small."""
        return self._states, self._edges, self._table, self._meta

    @property
    def match_length(self) -> int:
        """Tokens of the longest suffix that was followed by a token earlier; the text's own end was not."""
        state = self._kernels.matched_state(self._states, self._meta)
        return int(self._states[state, self._kernels.LENGTH])

    @property
    def state(self) -> int:
        """State of the current text. Set it back to continue that text after another was continued.

        Texts with the same beginning can grow in turns: each insertion extends the current text, and a
        continuation counts for all texts with the same end (a suffix automaton of a trie, Mohri et al.
        2009).
        """
        return int(self._meta[self._kernels.LAST])

    @state.setter
    def state(self, state: int) -> None:
        self._meta[self._kernels.LAST] = state

    def insert(self, tokens: TokenArray) -> None:
        """Appends `tokens` to the current text. O(1) amortised for each.

        Args:
            tokens: int32, shape (length,), ids of 0 and above.

        Raises:
            InvalidInputError: An id is negative.
        """
        array = np.array(tokens, np.int32, ndmin=1)  # a copy: the kernel is compiled for writable arrays only
        self._insert(array, 0)

    def end_text(self) -> None:
        """Ends the current text. The next insertion starts a new one."""
        self._insert(np.array([-1], np.int32))

    def _insert(self, tokens: TokenArray, lowest: int = -1) -> None:
        kernels = self._kernels
        done = 0
        while True:
            done = kernels.insert(self._states, self._edges, self._table, self._meta, tokens, done, lowest)
            if done == len(tokens):
                return
            if done < 0:
                raise InvalidInputError(f"Token id {int(tokens.min())} is negative.", "Ids start at 0.")
            self._states = _grown(self._states, int(self._meta[kernels.NEED_STATES]))
            self._edges = _grown(self._edges, int(self._meta[kernels.NEED_EDGES]))
            size = len(self._table)
            while size < self._meta[kernels.NEED_TABLE]:
                size *= 2
            if size > len(self._table):
                self._table = np.full(size, -1, np.int32)
                kernels.rebuild_table(self._edges, self._table, self._meta, self._states)

    def followers(self, context: TokenArray) -> dict[int, int]:
        """Counts of the tokens after `context`.

        Args:
            context: int32, shape (length,). Empty counts all tokens.

        Returns:
            Next token to count; empty if `context` does not occur or is not followed.

        Example:
            after 7 8 9 7 8 5, followers [7, 8]  ->  {9: 1, 5: 1}
        """
        kernels = self._kernels
        state = 0
        for token in context:
            edge = kernels.find_edge(self._states, self._edges, self._table, state, int(token))
            if edge < 0:
                return {}
            state = int(self._edges[edge, kernels.TARGET])
        counts: dict[int, int] = {}
        edge = int(self._states[state, kernels.FIRST_EDGE])
        while edge >= 0:
            counts[int(self._edges[edge, kernels.TOKEN])] = int(self._edges[edge, kernels.TAKEN])
            edge = int(self._edges[edge, kernels.NEXT])
        return counts

    def propose(self, budget: int, workspace: Workspace) -> Proposal:
        """The `budget` most probable nodes by the counts of every matched context. Changes nothing.

        Args:
            budget: The most nodes to return.
            workspace: Scratch made by `workspace`, one for each thread.
        """
        from retrieval_draft.index._kernels import automaton_tree

        found = workspace.fit(budget)
        size = automaton_tree.propose(
            self._states, self._edges, self._meta, self._params, budget, *workspace.scratch, *found
        )
        return found.proposal(size, "automaton", "request")

    @staticmethod
    def workspace() -> Workspace:
        """Scratch for `propose`."""
        from retrieval_draft.index._kernels import automaton_tree

        return Workspace(fields=4, children=automaton_tree.CHILDREN)


def _grown(array: NDArray[np.int32], rows: int) -> NDArray[np.int32]:
    if rows <= len(array):
        return array
    grown = np.empty((max(rows, int(len(array) * GROWTH) + 16), array.shape[1]), np.int32)
    grown[: len(array)] = array
    return grown


class AutomatonSession(BaseSession):
    """The text of one request."""

    def __init__(self, prompt: TokenArray, references: Sequence[TokenArray]) -> None:
        room = len(prompt) + sum(len(text) + 1 for text in references) + 256
        self.automaton = SuffixAutomaton(room)
        for text in references:
            self.automaton.insert(text)
            self.automaton.end_text()
        self.automaton.insert(prompt)
        self._workspace = SuffixAutomaton.workspace()

    def propose(self, budget: int) -> Proposal:
        """The tokens after earlier occurrences of the text's last tokens, as a tree."""
        return self.automaton.propose(budget, self._workspace)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self.automaton.insert(tokens)


class AutomatonSource(BaseSource):
    """Drafts from the request's own prompt, reply and reference texts."""

    name = "automaton"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> AutomatonSession:
        """Indexes the prompt, int32, shape (length,), and the references, int32 each."""
        return AutomatonSession(prompt, references)


def make_source(config: DraftConfig, stores: DraftStores) -> AutomatonSource:
    """A source over the request's own text."""
    return AutomatonSource()
