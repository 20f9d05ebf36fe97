"""Chains from a proposer's sessions, one after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import TokenArray
from retrieval_draft.proposer import Proposer, ProposerSession

__all__ = ["ProposerChains"]


class ProposerChains:
    """`ChainBatch`'s way of asking, on a `Proposer`."""

    def __init__(self, proposer: Proposer, most: int) -> None:
        self._proposer = proposer
        self._most = most
        self._sessions: dict[int, ProposerSession] = {}
        self._next = 0

    def open(self, prompt: TokenArray) -> int:
        """Starts a request; returns its session."""
        self._next += 1
        self._sessions[self._next] = self._proposer.open(prompt)
        return self._next

    def step(
        self,
        ids: NDArray[np.int64],
        new_tokens: TokenArray,
        counts: NDArray[np.int32],
        max_tokens: NDArray[np.int32],
        floor: float,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Takes in what each row emitted; returns chains, their lengths and path probabilities."""
        rows = len(ids)
        tokens = np.full((rows, self._most), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        probs = np.zeros((rows, self._most), np.float32)
        ends = np.cumsum(counts)
        for row, name in enumerate(ids.tolist()):
            session = self._sessions[name]
            session.observe(new_tokens[ends[row] - counts[row] : ends[row]])
            chain, path = session.propose_chain(int(max_tokens[row]), floor)
            lengths[row] = len(chain)
            tokens[row, : len(chain)], probs[row, : len(chain)] = chain, path
        return tokens, lengths, probs

    def close(self, session: int, *, finished: bool = True) -> None:
        """Ends a request."""
        self._sessions.pop(session).close(finished=finished)
