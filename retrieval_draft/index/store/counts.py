"""What happened to runs and entries so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["REASONS", "StoreCounts"]

REASONS = (
    "malformed",
    "version",
    "namespace",
    "unsigned",
    "altered",
    "length",
    "vocabulary",
    "rate",
    "servers",
)
"""Why an entry is dropped: no entry at all, another format version, tokenizer or tenant, no signature,
a wrong one, too long, an id out of range, its server adds too much, too many servers."""


@dataclass(slots=True)
class StoreCounts:
    """Counts since the start.

    Attributes:
        sent: Entries that Redis accepted, those it was sent twice counted once.
        resent: Entries sent again, as an outage may have lost them; readers take them in once.
        received: Entries read, our own among them.
        ingested: Entries taken in.
        ingested_tokens: Their tokens.
        duplicates: Entries that had come before.
        dropped: Entries not taken in, by reason.
        connections: Made to send or to receive.
        failures: Calls to Redis that failed.
        rereads: Times that a stretch of the log was read again.
        snapshots: Written by this server.
        snapshot_failures: That could not be written or read.
    """

    sent: int = 0
    resent: int = 0
    received: int = 0
    ingested: int = 0
    ingested_tokens: int = 0
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    failures: int = 0
    rereads: int = 0
    snapshots: int = 0
    snapshot_failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; every reason has its place."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "dropped"}
        return plain | {"dropped": {reason: self.dropped[reason] for reason in REASONS}}
