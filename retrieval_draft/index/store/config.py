"""Settings of the shared datastore."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retrieval_draft._settings import Range, check_ranges
from retrieval_draft.errors import InvalidInputError

__all__ = ["SHARES", "StoreConfig", "check_share"]

SHARES = ("none", "reply", "all")
"""Parts of a request that other servers may learn: nothing, its reply, or its prompt too."""

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Settings of the store through which servers share texts.

    Attributes:
        url: Store that servers share: ``redis://HOST:PORT``, ``rediss://``, ``unix://``,
            ``redis+cluster://``, ``redis+sentinel://`` or ``embedded://FOLDER``. User and password may be in
            it, or in the environment variables ``RETRIEVAL_DRAFT_REDIS_USERNAME`` and
            ``RETRIEVAL_DRAFT_REDIS_PASSWORD``.
        tenant: Servers of one tenant share with each other, and with no others.
        share: Parts of a request that others may learn, unless it overrides that: none, reply or all.
        key: A secret of all servers of the tenant. With one, entries are signed, and those that are not are
            dropped. Also from ``RETRIEVAL_DRAFT_STORE_KEY``.
        snapshots: A folder, or any URL of fsspec, with snapshots of the store.
        snapshot_seconds: Seconds between snapshots, each written by one server.
        max_bytes: Limit of the memory for shared text here; the oldest is evicted first.
        stream_bytes: Limit of the log's memory in Redis; the oldest entries are removed first.
        stream_seconds: Age at which entries leave the log.
        max_tokens: Limit of an entry. Longer ones are dropped; texts of this server are cut to it.
        tokens_per_second: Limit for one server, on average; entries beyond it are dropped. Four seconds'
            worth may arrive at once, and this server sends no faster.
        row_share: Bytes of adjacency rows that are sent for each byte of tokens, at most; 0 for texts alone.
        queue_tokens: Limit of the tokens that wait to be sent, as in an outage. The oldest are dropped first.
        timeout: Seconds after which the store counts as unreachable. No request ever waits for it.
    """

    url: str = field(repr=False)
    tenant: str = "default"
    share: str = "reply"
    key: str | bytes | None = field(default=None, repr=False)
    snapshots: str | Path | None = None
    snapshot_seconds: Annotated[float, Range(1, 1 << 30)] = 600.0
    max_bytes: Annotated[int, Range(1 << 20, 1 << 40)] = 1 << 28
    stream_bytes: Annotated[int, Range(1 << 20, 1 << 44)] = 1 << 28
    stream_seconds: Annotated[float, Range(1, 1 << 32)] = 7 * 86400.0
    max_tokens: Annotated[int, Range(64, 1 << 24)] = 1 << 15
    tokens_per_second: Annotated[int, Range(64, 1 << 40)] = 1_000_000
    row_share: Annotated[float, Range(0, 16)] = 0.5
    queue_tokens: Annotated[int, Range(64, 1 << 32)] = 1 << 22
    timeout: Annotated[float, Range(0.05, 60)] = 2.0

    def __post_init__(self) -> None:
        check_share(self.share)
        if not _TENANT.fullmatch(self.tenant) or self.tenant in (".", ".."):
            raise InvalidInputError(
                f"The tenant {self.tenant!r} is no name.", "Use 1 to 64 letters, digits, dots, - and _."
            )
        if self.key is not None and not self.key:
            raise InvalidInputError("The store's key is empty.", "Give a secret, or leave it out.")
        check_ranges(self)


def check_share(share: str) -> str:
    """Returns `share`.

    Raises:
        InvalidInputError: It is none of `SHARES`.
    """
    if share not in SHARES:
        raise InvalidInputError(f"share is {share!r}.", f"Choose from: {', '.join(SHARES)}.")
    return share
