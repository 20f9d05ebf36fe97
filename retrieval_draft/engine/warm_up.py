"""Compiles every kernel ahead of the first request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.drafting.session import Fuse
from retrieval_draft.drafting.warm_up import compile_drafting
from retrieval_draft.engine._kernels.moves import move_slots
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.index.source import DraftSource

__all__ = ["compile_kernels"]


def compile_kernels(sources: Sequence[DraftSource], tree: Fuse, top_k: int) -> None:
    """Runs each kernel of drafting and verification once, so that no request waits for numba.

    Args:
        sources: Sources of the same kinds, discarded afterwards.
        tree: Unites their proposals.
        top_k: Next tokens that sources learn for each node.
    """
    with progress("Compiling", None):
        LogitReader(top_k).read(torch.zeros((2, 2 * top_k + 8), dtype=torch.float32, device="cpu"))
        flat = torch.zeros(8, dtype=torch.float32, device="cpu")
        GumbelNoise(0, 8, flat.device).draw(flat, 0)
        move_slots(np.empty((0, 5), np.int64), np.empty(0, np.int64), 0)
    compile_drafting(sources, tree, top_k)
