"""Options of the commands that use a store."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.options import Fields
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.config import StoreConfig

__all__ = ["URL_OPTION", "URL_VARIABLE", "Store", "configured", "needed", "password"]

URL_VARIABLE = "RETRIEVAL_DRAFT_REDIS_URL"


URL_OPTION = typer.Option("--store", envvar=URL_VARIABLE, show_envvar=True, show_default=False)

Store = Annotated[
    StoreConfig,
    Fields(
        "tenant", "share", "snapshots", "snapshot_seconds",
        url=URL_OPTION, timeout="--store-timeout", defaults={"url": ""},
    ),
]  # fmt: skip
"""Without ``--store`` a configuration with an empty URL; `configured` makes it None."""


def configured(store: StoreConfig) -> StoreConfig | None:
    """The configuration from the options; None without a store.

    Raises:
        InvalidInputError: Its URL cannot be used.
    """
    if not store.url:
        return None
    from retrieval_draft.index.store.url import parse_store_url

    parse_store_url(store.url)  # refused before a model is loaded
    location = store.snapshots
    return replace(
        store, snapshots=location if location is None or "://" in str(location) else Path(location)
    )


def needed(store: StoreConfig) -> StoreConfig:
    """The configuration.

    Raises:
        InvalidInputError: There is none.
    """
    found = configured(store)
    if found is None:
        raise InvalidInputError("There is no store.", f"Name one with --store, or in {URL_VARIABLE}.")
    return found


def password() -> str | None:
    """Password of the store, from the environment."""
    from retrieval_draft.index.store.url import PASSWORD_VARIABLE

    return os.environ.get(PASSWORD_VARIABLE) or None
