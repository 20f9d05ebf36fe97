"""Adapters that are served beside the model, each with drafts of its own."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.methods.registry import get_method
from retrieval_draft.models.adapters import with_adapter
from retrieval_draft.server.tenants import Tenants

__all__ = ["adapter_tenants"]


def adapter_tenants(
    base: RetrievalDrafter, name: str, folder: Path, default: str, history_bytes: int
) -> Tenants:
    """Drafters for the tenants of an adapter, apart from those of the model and of other adapters.

    Corpora and phrases are those of the model; history, adjacency matrix, calibration, measured costs and the
    part of the store are the adapter's own. Draft models draft for the model alone.

    Args:
        base: The model's drafter, of the default tenant.
        name: Of the adapter.
        folder: Of the adapter.
        default: The default tenant.
        history_bytes: Memory for the history of each other tenant.
    """
    parts = base.context
    config = parts.config
    if config.history_folder is not None:
        config = replace(config, history_folder=str(Path(config.history_folder, _key("adapter", name))))
    if parts.models and get_method(config.method).needs_model:
        config = replace(config, method="calibrated")

    def key(tenant: str) -> str:
        return _key(name, tenant)

    store = None if base.store is None else replace(base.store.config, tenant=key(default))
    drafter = RetrievalDrafter.for_model(
        with_adapter(base.target.model, folder),
        base.tokenizer,
        corpora=parts.stores.corpora,
        phrases=parts.stores.phrases,
        store=store,
        config=config,
    )
    return Tenants(drafter, default, history_bytes, key)


def _key(first: str, second: str) -> str:
    """A name for a pair of names, that no other pair has: of letters, digits and -."""
    digest = hashlib.sha256(f"{first}\0{second}".encode()).hexdigest()[:32]
    return f"{re.sub('[^A-Za-z0-9]', '-', first)[:24]}-{digest}"
