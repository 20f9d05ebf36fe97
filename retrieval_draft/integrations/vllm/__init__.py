"""Drafts for vLLM."""

from retrieval_draft.integrations.vllm.options import VllmOptions
from retrieval_draft.integrations.vllm.retrieval_proposer import RetrievalProposer

__all__ = ["RetrievalProposer", "VllmOptions"]
