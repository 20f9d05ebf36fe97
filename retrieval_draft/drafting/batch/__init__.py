"""Chains for many requests at once: one call a step drafts for a whole batch, outside of the GIL."""

from __future__ import annotations

from retrieval_draft.drafting.batch.chain_batch import ChainBatch

__all__ = ["ChainBatch"]
