"""OPT-Tree: a draft model's tree with the most expected accepted tokens.

Wang et al. (TACL 2025, arXiv:2406.17276): each layer keeps the n best extensions of the nodes before; the
expansion stops where a layer adds less than delta to the expected number of accepted tokens; of all nodes the
50 with the largest path products are verified. Published settings: depth 10, delta 0.5. Here a layer expands
ten nodes into ten children, as their draft models do, and ties go to the shallower node, so that a parent is
never left out, unlike in the released selection.
"""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.index.source import DraftSource
from retrieval_draft.methods.drafted import drafter
from retrieval_draft.methods.lookup import MethodSource
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["LIMITS", "METHOD"]

LIMITS = ExpansionLimits(top_k=10, depth=10, entropy_stop=None, gain_stop=0.5)


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    model = drafter(parts, "opt_tree")
    return [MethodSource("opt_tree", lambda prompt, references: model.session(prompt, LIMITS, 1))]


METHOD = Method(
    "opt_tree",
    "Wang et al. 2025, arXiv:2406.17276",
    _sources,
    as_proposed,
    nodes=50,
    needs_model=True,
    reads_text=False,
)
