"""EAGLE-3: a head over three layers of the target, alone.

Li et al. (2025, arXiv:2503.01840): each level expands the ten likeliest nodes into ten children, seven levels
after the first; of all nodes the 59 with the largest path products are verified, with the root 60.
"""

from __future__ import annotations

from retrieval_draft.engine.draft_models.eagle import Eagle3Head
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.methods.drafted import head_method

__all__ = ["LIMITS", "METHOD"]

LIMITS = ExpansionLimits(top_k=10, depth=8, entropy_stop=None)

METHOD = head_method("eagle3", "Li et al. 2025, arXiv:2503.01840", (Eagle3Head,), LIMITS, nodes=59)
