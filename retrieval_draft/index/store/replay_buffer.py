"""Recently received entries, to be put back where Redis has lost them."""

from __future__ import annotations

import random
import time
from collections import deque

__all__ = ["ReplayBuffer"]

_MAX_BYTES = 1 << 24
_PATIENCE = (0.5, 2.5)
"""Seconds that the sender of an entry, or another reader, has to send it again before this reader does."""


class ReplayBuffer:
    """Entries of the last seconds, as in the log.

    A crash of Redis loses accepted entries that were not yet synced. Their sender sends them again; but if
    the sender has died as well, only readers have them. So after a crash each reader checks which of its
    recent entries are in the log that it reads again, and puts the others back.

    Args:
        seconds: Time for which entries are kept.

    Example:
        note(a), note(b), suspect, seen(a), caught up: two seconds later missing() returns b, once
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept: deque[tuple[float, tuple[bytes, int], bytes]] = deque()
        self._bytes = 0
        self._suspects: dict[tuple[bytes, int], bytes] = {}
        self._due = float("inf")

    @property
    def is_suspicious(self) -> bool:
        """True if entries are being looked for."""
        return bool(self._suspects)

    @property
    def nbytes(self) -> int:
        """Bytes of the entries kept."""
        return self._bytes

    def note(self, server: bytes, sequence: int, payload: bytes, now: float) -> None:
        """Keeps a received entry."""
        self._kept.append((now, (server, sequence), payload))
        self._bytes += len(payload)
        while self._kept[0][0] < now - self._seconds or self._bytes > _MAX_BYTES:
            self._bytes -= len(self._kept.popleft()[2])
            if not self._kept:
                break

    def mark_lost(self, lost: float) -> None:
        """Marks entries as possibly lost: Redis was lost at `lost`, and the log is about to be read again."""
        self._suspects |= {name: payload for at, name, payload in self._kept if at >= lost - self._seconds}
        self._due = float("inf")

    def seen(self, server: bytes, sequence: int) -> None:
        """Records that an entry is in the log."""
        self._suspects.pop((server, sequence), None)

    def caught_up(self) -> None:
        """Records that the log has been read to its end."""
        if self._suspects and self._due == float("inf"):
            self._due = time.monotonic() + random.uniform(*_PATIENCE)

    def missing(self) -> list[bytes]:
        """Entries that are not in the log, once it is time to put them back."""
        if not self._suspects or time.monotonic() < self._due:
            return []
        found, self._suspects, self._due = list(self._suspects.values()), {}, float("inf")
        return found
