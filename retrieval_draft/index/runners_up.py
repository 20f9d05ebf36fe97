"""Guesses of the next token among those that the target ranked high, but did not choose, a moment ago.

The logits that chose a token also rank guesses of the one after it ("LogitSpec", 2025, arXiv:2507.01449);
here the last positions do so together, the nearest with the most weight. On replies of SmolLM2 135M one token
in six is among the seven runners-up of the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import (
    CONTEXT,
    BaseSession,
    BaseSource,
    NodeLogits,
    Proposal,
    TokenArray,
    empty_proposal,
)

__all__ = ["RunnersUpSession", "RunnersUpSource", "make_source"]

POSITIONS = 16
KEPT = 8
"""Positions whose predictions are kept, and predictions of each."""

LAST, EARLIER, FADE = 0.6, 0.12, 0.93
"""Weight of the last position, of the one before it, and the ratio of each earlier one to the next."""

WEIGHTS: NDArray[np.float32] = np.array(
    [LAST, *(EARLIER * FADE**back for back in range(1, POSITIONS))], np.float32
)


class RunnersUpSession(BaseSession):
    """The last predictions of one request.

    Args:
        prompt: int32, shape (length,).

    Example:
        7 was chosen from [7, 4] with probabilities [.7, .2]: 4 is a guess of the token after it, .6 * .2
    """

    learns_early = True

    def __init__(self, prompt: TokenArray) -> None:
        from retrieval_draft.index._kernels import runners_up

        self._kernels: Any = runners_up
        self._tail: NDArray[np.int32] = np.full(POSITIONS + CONTEXT, -1, np.int32)
        self._tokens: NDArray[np.int32] = np.full((POSITIONS, KEPT), -1, np.int32)
        self._probs: NDArray[np.float32] = np.zeros((POSITIONS, KEPT), np.float32)
        self._found: NodeLogits | None = None
        self.observe(prompt)

    def propose(self, budget: int) -> Proposal:
        """Children of the root, the best `budget` of them."""
        if self._found is not None:  # the tokens that show which nodes were accepted have come by now
            found, self._found = self._found, None
            self._kernels.keep(
                self._tail,
                np.ascontiguousarray(found.contexts, np.int32),
                np.ascontiguousarray(found.top_tokens, np.int32),
                np.ascontiguousarray(found.top_probs, np.float32),
                self._tokens,
                self._probs,
            )
        if budget <= 0:
            return empty_proposal(RunnersUpSource.name, RunnersUpSource.level)
        nodes, probs = np.empty((3, budget), np.int32), np.empty(budget, np.float32)
        size = self._kernels.propose(self._tail, self._tokens, self._probs, WEIGHTS, nodes, probs)
        if not size:
            return empty_proposal(RunnersUpSource.name, RunnersUpSource.level)
        tokens, parents, lengths = nodes[:, :size]
        return Proposal(tokens, parents, probs[:size], lengths, RunnersUpSource.name, RunnersUpSource.level)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,); the predictions move back."""
        last = np.array(tokens[-len(self._tail) :], np.int32)  # a copy, which is writable, as kernels want it
        self._kernels.advance(self._tail, last, self._tokens, self._probs)

    def learn(self, logits: NodeLogits) -> None:
        """Keeps predictions until the next step."""
        self._found = logits if logits.top_tokens.shape[1] > 1 else None


class RunnersUpSource(BaseSource):
    """Drafts from the ranks of the target's own last predictions."""

    name = "runners-up"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> RunnersUpSession:
        """Starts at the end of the prompt, int32, shape (length,); references have no predictions."""
        return RunnersUpSession(prompt)


def make_source(config: DraftConfig, stores: DraftStores) -> RunnersUpSource:
    """A source that needs no datastore."""
    return RunnersUpSource()
