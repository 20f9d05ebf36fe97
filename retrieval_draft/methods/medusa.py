"""Medusa: a head for each further position, alone.

Cai et al. (2024, arXiv:2401.10774): 63 nodes beside the root, of up to ten children a node. The published
tree has one shape for all steps, fitted to the heads' mean accuracy by rank; here each step takes the nodes
with the largest path products, as EAGLE-2 does. Its typical acceptance changes the output and is left out.
"""

from __future__ import annotations

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.vector_heads import MedusaHead
from retrieval_draft.methods.drafted import head_method

__all__ = ["LIMITS", "METHOD"]

LIMITS = ExpansionLimits(top_k=10, entropy_stop=None)

METHOD = head_method("medusa", "Cai et al. 2024, arXiv:2401.10774", (MedusaHead,), LIMITS, nodes=63)
