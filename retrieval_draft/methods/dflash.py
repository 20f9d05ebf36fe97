"""DFlash: a block of tokens guessed in one pass, alone.

Chen et al. (2026, arXiv:2602.06036): the likeliest token of each position, one chain as long as the block
that the head was trained for, 15 for published ones.
"""

from __future__ import annotations

from retrieval_draft.engine.draft_models.dflash import DFlashHead
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.methods.drafted import head_method

__all__ = ["LIMITS", "METHOD"]

LIMITS = ExpansionLimits(top_k=1, depth=15, entropy_stop=None)

METHOD = head_method("dflash", "Chen et al. 2026, arXiv:2602.06036", (DFlashHead,), LIMITS, nodes=15)
