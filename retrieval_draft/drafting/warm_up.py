"""Compiles the kernels of sources, fusion and calibration ahead of the first request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft._progress import progress
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.drafting.session import Fuse, prompt_contexts
from retrieval_draft.index.source import DraftSource, NodeLogits

__all__ = ["compile_drafting"]


def compile_drafting(sources: Sequence[DraftSource], tree: Fuse, top_k: int) -> None:
    """Runs each kernel once, so that no request waits for numba.

    Takes seconds after a fresh install, and a fraction of one from then on: the machine code is kept beside
    the modules, or in ``NUMBA_CACHE_DIR``. A progress bar shows it.

    Args:
        sources: Sources of the same kinds, discarded afterwards.
        tree: Unites their proposals.
        top_k: Next tokens that sources learn for each node.
    """
    nodes = 4
    prompt = np.arange(8, dtype=np.int32).repeat(2) % 4
    top_tokens = np.arange(top_k, dtype=np.int32)[None].repeat(2, 0)
    top_probs = np.full((2, top_k), 1 / (top_k + 1), np.float32)
    with progress("Compiling", None):
        calibration = Calibration()
        hierarchy = SourceHierarchy(sources)
        for _ in range(2):  # the second request drafts from the first
            drafts = hierarchy.open(prompt, ())
            drafts.learn(NodeLogits(prompt_contexts(prompt, 2), top_tokens, top_probs))
            for token in (0, 0, 1):
                proposals = drafts.propose(nodes)
                emitted = np.array([token], np.int32)
                if proposals:
                    calibration.observe(tree(0, proposals, calibration, nodes), proposals, emitted)
                drafts.observe(emitted)
            drafts.close()
            hierarchy.flush()
        hierarchy.close()
