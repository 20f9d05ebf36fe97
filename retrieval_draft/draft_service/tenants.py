"""One proposer for each tenant, so that no tenant drafts from another's text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from retrieval_draft.proposer import Proposer

__all__ = ["Proposers"]


class Proposers:
    """Makes a tenant's proposer at its first request. Safe to use from several threads.

    Args:
        make: Makes the proposer of a tenant.
        most: Limit of tenants, of which there are at most as many as API keys.
        fingerprint: Of the tokenizer; empty where there is none.

    Attributes:
        fingerprint: As given.

    Example:
        proposers = Proposers.for_tokenizer(tokenizer, corpora=["index"])
        session = proposers.get("team-a").open(prompt)
    """

    def __init__(self, make: Callable[[str], Proposer], most: int = 1024, fingerprint: str = "") -> None:
        self._make, self._most = make, most
        self.fingerprint = fingerprint
        self._made: dict[str, Proposer] = {}
        self._lock = threading.Lock()

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

    def get(self, tenant: str = "default") -> Proposer:
        """The tenant's proposer; made at the first call.

        Raises:
            InvalidInputError: There are too many tenants.
        """
        found = self._made.get(tenant)
        if found is not None:
            return found
        with self._lock:
            if tenant not in self._made:
                if len(self._made) >= self._most:
                    raise InvalidInputError(f"There are {self._most} tenants, and no more may be.")
                self._made[tenant] = self._make(tenant)
            return self._made[tenant]

    def made(self) -> dict[str, Proposer]:
        """Proposers made so far, by tenant."""
        return dict(self._made)

    @property
    def nbytes(self) -> int:
        """Bytes held by all of them, sessions excluded."""
        return sum(proposer.nbytes for proposer in self.made().values())

    def close(self) -> None:
        """Closes all, even if one of them raises."""
        with self._lock, ExitStack() as stack:
            for proposer in self._made.values():
                stack.callback(proposer.close)
