"""Tokens that the target ranked high at the last positions of the text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray

POSITIONS = int(os.environ.get("RU_POS", "24"))
KEPT = 8
TAIL = POSITIONS + CONTEXT + 2
D = float(os.environ.get("RU_D", "0.93"))
W0 = float(os.environ.get("RU_W0", "0.3"))
W1 = float(os.environ.get("RU_W1", "0.12"))
C1 = float(os.environ.get("RU_C", "0.02"))

WEIGHTS = np.array([[W0 if b == 0 else W1 * D**b, 0 if b == 0 else C1 * D**b] for b in range(POSITIONS)], np.float32)


class RunnersUpSession:
    def __init__(self, prompt: TokenArray) -> None:
        from retrieval_draft.index._kernels import runners_up

        self._kernels: Any = runners_up
        self._tail: NDArray[np.int32] = np.full(TAIL, -1, np.int32)
        self._tokens: NDArray[np.int32] = np.full((POSITIONS, KEPT), -1, np.int32)
        self._probs: NDArray[np.float32] = np.zeros((POSITIONS, KEPT), np.float32)
        self._logits: NodeLogits | None = None
        self.observe(prompt)

    def propose(self, budget: int) -> Proposal:
        if self._logits is not None:
            found, self._logits = self._logits, None
            self._kernels.keep(
                self._tail, np.ascontiguousarray(found.contexts), np.ascontiguousarray(found.top_tokens), np.ascontiguousarray(found.top_probs), np.empty(0, np.int64), self._tokens, self._probs
            )
        room = 96
        tokens = np.empty(room, np.int32)
        probs = np.empty(room, np.float32)
        lengths = np.empty(room, np.int32)
        size = self._kernels.propose(self._tail, self._tokens, self._probs, WEIGHTS, budget, tokens, probs, lengths)
        return Proposal(tokens[:size], np.full(size, -1, np.int32), probs[:size], lengths[:size], "runners-up", "request")

    def observe(self, tokens: TokenArray) -> None:
        size = min(len(tokens), TAIL)
        if size:
            self._tail[: TAIL - size] = self._tail[size:]
            self._tail[TAIL - size :] = tokens[len(tokens) - size :]
            size = min(size, POSITIONS)
            self._tokens[size:] = self._tokens[: POSITIONS - size]
            self._probs[size:] = self._probs[: POSITIONS - size]
            self._tokens[:size] = -1

    def learn(self, logits: NodeLogits) -> None:
        self._logits = logits

    def close(self) -> None:
        """Does nothing."""


class RunnersUpSource:
    name = "runners-up"
    level = "request"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> RunnersUpSession:
        return RunnersUpSession(prompt)

    def flush(self) -> None:
        """Does nothing: no state outlives a request."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """0: sessions hold everything."""
        return 0


def make_source(config: DraftConfig, stores: DraftStores) -> RunnersUpSource:
    return RunnersUpSource()
