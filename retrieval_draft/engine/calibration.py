"""How far a source's estimate can be believed, learned from what was accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.engine.tree import DraftTree
from retrieval_draft.index.source import Proposal, TokenArray

__all__ = ["Calibration"]

PRIOR = 6.0
"""Expected acceptances that a cell starts with, all of them met: it takes about so many to move it."""

MEMORY = 128.0
"""Expected acceptances after which a cell forgets half of what it saw."""


class Calibration:
    """Accepted over expected, for each set of sources and each bin of their joint estimate.

    Every child of an accepted node is an observation: it was, or was not, what the target emitted. So a
    step that verified nothing teaches too, and a source that was wrong for a while is believed again when it
    is right.
    """

    def __init__(self) -> None:
        from retrieval_draft.engine._kernels.fusion import CELLS

        self.expected: NDArray[np.float64] = np.zeros(CELLS, np.float64)
        self.accepted: NDArray[np.float64] = np.zeros(CELLS, np.float64)

    @property
    def ratios(self) -> NDArray[np.float64]:
        """float64, shape (cells,). What an estimate is multiplied by."""
        return (self.accepted + PRIOR) / (self.expected + PRIOR)

    def observe(self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray) -> None:
        """Notes what became of a step's guesses, verified or not.

        Args:
            tree: The whole fused tree of the step.
            proposals: What it was fused from.
            emitted: int32, shape (length,). What the target emitted after the root.
        """
        if tree.raw is None or tree.cells is None or not len(emitted):
            return
        from retrieval_draft.engine._kernels.fusion import score

        score(
            tree.tokens,
            tree.parents,
            tree.raw,
            tree.cells,
            np.array(emitted, np.int32),
            self.expected,
            self.accepted,
            MEMORY,
        )
