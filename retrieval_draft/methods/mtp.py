"""MTP: the target's own layers for multi-token prediction, alone.

DeepSeek-AI (2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437): a chain of one token a layer. Servers
use a single layer again for further tokens, as here: four at most.
"""

from __future__ import annotations

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.mtp import MtpHead
from retrieval_draft.methods.drafted import head_method

__all__ = ["LIMITS", "METHOD"]

LIMITS = ExpansionLimits(top_k=1, depth=4, entropy_stop=None)

METHOD = head_method("mtp", "DeepSeek-AI 2024, arXiv:2412.19437", (MtpHead,), LIMITS, nodes=4)
