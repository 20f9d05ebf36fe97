"""Drafts for llama-cpp-python."""

from retrieval_draft.integrations.llama_cpp.draft_model import RetrievalDraftModel
from retrieval_draft.integrations.llama_cpp.gguf_tokenizer import GgufTokenizer

__all__ = ["GgufTokenizer", "RetrievalDraftModel"]
