"""Datastores of a proposer in vLLM, opened by its options."""

from __future__ import annotations

from typing import Any

from retrieval_draft.drafting.batch import ChainBatch
from retrieval_draft.drafting.open_stores import open_draft_stores
from retrieval_draft.integrations.vllm.options import VllmOptions

__all__ = ["DraftStores"]


class DraftStores:
    """Chains over history, corpora and the shared store, with their clean-up.

    Args:
        options: As read.
        tokenizer: The model's; needed where text is saved, shared or read from elsewhere.
        vocabulary: Number of token ids.
        most: Limit of a chain's length.

    Attributes:
        chains: Batch of the sessions.

    Raises:
        InvalidInputError: An option cannot be used.
        DatastoreError: A corpus is missing or torn.
        TokenizerMismatchError: A corpus belongs to another tokenizer.
    """

    def __init__(self, options: VllmOptions, tokenizer: Any, vocabulary: int, most: int) -> None:
        config = options.draft_config()
        self._stores = open_draft_stores(
            tokenizer, vocabulary, config, options.index, options.phrases, options.store_config()
        )
        self.chains = ChainBatch(self._stores, config, max_chain=most, threads=options.threads)

    def flush(self) -> None:
        """Waits until finished requests' texts can be drafted from, and saves the calibration."""
        self.chains.flush()
        if self._stores.shared is not None:
            self._stores.shared.flush()

    def close(self) -> None:
        """Saves and sends pending data, and stops background threads."""
        self.chains.shut_down()
        if self._stores.shared is not None:
            self._stores.shared.close()
