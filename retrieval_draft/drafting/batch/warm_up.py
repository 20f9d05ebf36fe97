"""Compiles what chains need."""

from __future__ import annotations

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.sources import Datastores

__all__ = ["compile_chains"]

_VOCABULARY = 16


def compile_chains() -> None:
    """Drafts for two requests that are thrown away. A few milliseconds where the kernels are on disk."""
    from retrieval_draft.drafting.batch.chain_batch import ChainBatch

    batch = ChainBatch(
        Datastores(_VOCABULARY), DraftConfig(sources=("automaton", "adjacency", "history"), adjacency_rows=16)
    )
    text = np.array([5, 6, 7, 8, 9, 5, 6, 7, 8], np.int32)
    batch.close(batch.open(text))
    batch.flush()
    session = batch.open(text)
    for token in (9, 5):
        batch.step([session], [token], [1])
    batch.shut_down()
