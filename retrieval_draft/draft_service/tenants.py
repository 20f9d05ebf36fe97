"""One proposer for each tenant, so that no tenant drafts from another's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrieval_draft.config import DraftConfig
from retrieval_draft.http.per_tenant import PerTenant
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from retrieval_draft.proposer import Proposer

__all__ = ["Proposers"]


class Proposers(PerTenant[Proposer]):
    """A proposer for each tenant.

    Args:
        make: Makes the proposer of a tenant.
        most: Limit of tenants.
        fingerprint: Of the tokenizer; empty where there is none.

    Attributes:
        fingerprint: As given.

    Example:
        proposers = Proposers.for_tokenizer(tokenizer, corpora=["index"])
        session = proposers["team-a"].open(prompt)
    """

    def __init__(self, make: Callable[[str], Proposer], most: int = 1024, fingerprint: str = "") -> None:
        super().__init__(make, most)
        self.fingerprint = fingerprint

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        corpora: Sequence[str | Path] = (),
        phrases: Any = None,
        store: str | StoreConfig | None = None,
        config: DraftConfig | None = None,
        most: int = 1024,
        default: str = "default",
    ) -> Proposers:
        """Proposers that share corpora only.

        Args:
            tokenizer: As for `Proposer.for_tokenizer`, like the rest.
            vocabulary: Number of token ids.
            corpora: Opened once, for all.
            phrases: Fixed texts that the model often repeats.
            store: Each tenant has a namespace of its own in it.
            config: A history folder gets a folder for each tenant but `default`.
            most: Limit of tenants.
            default: The tenant that uses `store` and the history folder directly.
        """
        opened = [Corpus.open(corpus) for corpus in corpora]
        settings = config if config is not None else DraftConfig()

        def make(tenant: str) -> Proposer:
            own, log = settings, store
            if tenant != default:
                if settings.history_folder is not None:
                    own = replace(settings, history_folder=str(Path(settings.history_folder) / tenant))
                if isinstance(store, str):
                    log = StoreConfig(store, tenant=tenant)
                elif isinstance(store, StoreConfig):
                    log = replace(store, tenant=tenant)
            return Proposer.for_tokenizer(
                tokenizer, vocabulary=vocabulary, corpora=opened, phrases=phrases, store=log, config=own
            )

        return cls(make, most, "" if tokenizer is None else tokenizer_fingerprint(tokenizer))
