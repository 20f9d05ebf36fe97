"""How far the sources' estimates can be believed, learned from what was accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.engine.tree import DraftTree
from retrieval_draft.index.source import Proposal, TokenArray

__all__ = ["Calibration"]

PRIOR = 20.0
"""Expected acceptances that a cell starts with, all of them met: it takes about so many to move it."""

AGREEMENT = 1.2
AGREEMENT_ODDS = 0.3
RATE = 0.01
"""Two sources that agree start at 1.2 times the mean of their log odds and 0.3 more; from there each set of
sources learns its own weights, at this rate."""

MEMORY = 128.0
"""Expected acceptances after which a cell forgets half of what it saw."""


class Calibration:
    """Weights by which sources are mixed in log odds, and accepted over expected by bins of the result.

    Both are kept for each set of sources, so that it is learned what their agreement is worth.

    Every child of an accepted node is an observation: it was, or was not, what the target emitted. So a
    step that verified nothing teaches too, and a source that was wrong for a while is believed again when it
    is right.
    """

    def __init__(self) -> None:
        from retrieval_draft.engine._kernels.fusion import CELLS, MASKS, SOURCES

        sets = np.arange(MASKS)
        members = (sets[:, None] >> np.arange(SOURCES)) & 1
        size = np.maximum(members.sum(1), 1)
        self.weights: NDArray[np.float64] = np.zeros((MASKS, SOURCES + 1))
        # Alone a source is taken at its word; together they count as somewhat more than their mean.
        self.weights[:, :SOURCES] = members * np.where(size > 1, AGREEMENT / size, 1.0)[:, None]
        self.weights[:, SOURCES] = np.where(size > 1, AGREEMENT_ODDS, 0.0)
        self.expected: NDArray[np.float64] = np.zeros(CELLS, np.float64)
        self.accepted: NDArray[np.float64] = np.zeros(CELLS, np.float64)

    def observe(self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray) -> None:
        """Notes what became of a step's guesses, verified or not.

        Args:
            tree: The whole fused tree of the step.
            proposals: What it was fused from.
            emitted: int32, shape (length,). What the target emitted after the root.
        """
        if tree.raw is None or tree.cells is None or tree.odds is None or not len(emitted):
            return
        from retrieval_draft.engine._kernels.fusion import score

        score(
            tree.tokens,
            tree.parents,
            tree.raw,
            tree.cells,
            tree.odds,
            np.array(emitted, np.int32),
            self.weights,
            self.expected,
            self.accepted,
            RATE,
            MEMORY,
        )
