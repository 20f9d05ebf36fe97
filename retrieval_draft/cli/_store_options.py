"""Options of the commands that use a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval_draft.errors import InvalidInputError

if TYPE_CHECKING:
    from retrieval_draft.index.store.config import StoreConfig

__all__ = ["URL_VARIABLE", "Share", "Snapshots", "Store", "Tenant", "config", "needed"]

URL_VARIABLE = "RETRIEVAL_DRAFT_REDIS_URL"

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar=URL_VARIABLE,
        show_envvar=True,
        show_default=False,
        help="Store that servers share: redis://HOST:PORT, embedded://FOLDER, ...",
    ),
]
Tenant = Annotated[str, typer.Option("--tenant", help="Servers of one tenant share with each other.")]
Share = Annotated[
    str, typer.Option("--share", help="Parts of a request that others may learn: none, reply or all.")
]
Snapshots = Annotated[
    str | None,
    typer.Option("--snapshots", help="A folder or URL with snapshots of the store.", show_default=False),
]


def config(url: str | None, tenant: str, share: str, snapshots: str | None = None) -> StoreConfig | None:
    """The configuration from the options; None without a store.

    Raises:
        InvalidInputError: One of them cannot be used.
    """
    from retrieval_draft.index.store.config import StoreConfig

    if not url:
        return None
    from retrieval_draft.index.store.url import parse_store_url

    parse_store_url(url)  # refused before a model is loaded
    location = snapshots if snapshots is None or "://" in snapshots else Path(snapshots)
    return StoreConfig(url, tenant=tenant, share=share, snapshots=location)


def needed(url: str | None) -> str:
    """The URL.

    Raises:
        InvalidInputError: There is none.
    """
    if not url:
        raise InvalidInputError("There is no store.", f"Name one with --store, or in {URL_VARIABLE}.")
    return url


def password() -> str | None:
    """Password of the store, from the environment."""
    from retrieval_draft.index.store.url import PASSWORD_VARIABLE

    return os.environ.get(PASSWORD_VARIABLE) or None
