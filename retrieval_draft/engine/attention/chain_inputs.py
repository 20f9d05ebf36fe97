"""Model inputs for a chain of drafts, of which the model makes masks and positions as for any text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeInputs

__all__ = ["ChainAttention"]


class ChainAttention:
    """Turns draft chains into arguments of the model's forward pass.

    Args:
        device: Device of the model's inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(
        self, tree: DraftTree, length: int, moved: NDArray[np.int64] | None = None, shift: int = 0
    ) -> TreeInputs:
        """Arguments for a forward pass over a chain after `length` tokens.

        Args:
            tree: Root and drafts, each the parent of the next.
            length: Tokens before the root.
            moved: None: an accepted chain lies in place.
            shift: Position of the root, less `length`.
        """
        assert moved is None
        length += shift
        ids = torch.from_numpy(tree.tokens.astype(np.int64)).to(self.device)[None]
        positions = torch.arange(length, length + len(tree), device=self.device)[None]
        return TreeInputs(ids, positions, None, None)
