"""Counters of runs and entries."""

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
"""Reasons for dropping an entry: not an entry, another format version, tokenizer or tenant, no signature, a
wrong one, too long, an id out of range, its server's rate limit, too many servers."""


@dataclass(slots=True)
class StoreCounts:
    """Counts since the start.

    Attributes:
        sent: Entries with texts that Redis accepted; repeated ones count once.
        sent_learned: Likewise entries with what was learned.
        resent: Entries sent again, as an outage may have lost them; readers ingest them once.
        received: Entries read, our own among them.
        ingested: Entries with texts added; those with what was learned are `learned_entries` of the status.
        ingested_tokens: Their tokens.
        duplicates: Entries that had been received before.
        dropped: Entries not added, by reason.
        connections: Connections made to send or to receive.
        failures: Calls to Redis that failed.
        rereads: Number of times that a part of the log was read again.
        snapshots: Snapshots written by this server.
        snapshot_failures: Snapshots that could not be written or read.
    """

    sent: int = 0
    sent_learned: int = 0
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
        """Plain types for JSON, with every reason."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "dropped"}
        return plain | {"dropped": {reason: self.dropped[reason] for reason in REASONS}}
