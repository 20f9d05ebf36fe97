"""Compiles the kernels of sources, fusion and calibration ahead of the first request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft._progress import progress
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.cost import SIZES, CostModel
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.drafting.session import DraftPlan, DraftSession, Fuse, prompt_contexts
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import DraftSource, NodeLogits, TokenArray

__all__ = ["compile_drafting"]

_NONE = np.empty(0, np.int32)

_LONG = 4096
"""Tokens beyond which what sources keep of a request has grown."""


def compile_drafting(sources: Sequence[DraftSource], tree: Fuse, top_k: int) -> None:
    """Runs each kernel once, so that no request waits for numba.

    Takes seconds after a fresh install, and a fraction of one from then on: the machine code is kept beside
    the modules, or in ``NUMBA_CACHE_DIR``. A progress bar shows it.

    Args:
        sources: Sources of the same kinds, discarded afterwards.
        tree: Unites their proposals.
        top_k: Next tokens that sources learn for each node.
    """
    prompt = np.tile(np.arange(16, dtype=np.int32), 3)  # it copies itself
    costs = CostModel()
    costs.load({size: 1.0 + size for size in SIZES})
    with progress("Compiling", None):
        hierarchy = SourceHierarchy(sources)
        for _ in range(2):  # the second request drafts from the first
            _decode(DraftSession(hierarchy.open(prompt, ()), tree, Calibration(), 4, 32, DraftStats()),
                    prompt, top_k, costs)  # fmt: skip
            hierarchy.flush()
        hierarchy.close()


def _decode(session: DraftSession, prompt: TokenArray, top_k: int, costs: CostModel) -> None:
    """Drafts for a request that continues its copy, leaves it, and becomes long."""
    top_tokens = np.arange(top_k, dtype=np.int32)[None].repeat(len(prompt), 0)
    top_probs = np.full(top_tokens.shape, 1 / (top_k + 1), np.float32)
    contexts = prompt_contexts(prompt, len(prompt))
    session.learn(DraftPlan(DraftTree.root(0), DraftTree.root(0), ()), _NONE,
                  NodeLogits(contexts, top_tokens, top_probs))  # fmt: skip
    root = int(prompt[-1])
    for token in (0, 1, 2, 17, 18, 17, 19, 3):
        plan = session.propose(root, len(prompt), 8)
        costs.choose(plan.tree.path_probs[1:])
        costs.observe(1, len(prompt), 2.0)
        emitted, root = np.array([token], np.int32), token
        nodes = len(plan.tree.tokens)
        session.observe(emitted)
        session.learn(
            plan, emitted, NodeLogits(plan.tree.contexts(prompt), top_tokens[:nodes], top_probs[:nodes])
        )
    session.observe(np.arange(_LONG, dtype=np.int32) % 31)
    session.close()
