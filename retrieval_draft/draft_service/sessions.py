"""The open sessions of the drafting service: bounded, and closed when idle."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np

from retrieval_draft.draft_service.errors import ServiceFullError, TooLargeError, UnknownSessionError
from retrieval_draft.draft_service.limits import SessionLimits
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import TokenArray
from retrieval_draft.proposer import ProposerSession

__all__ = ["OpenSession", "SessionTable", "unknown"]

_ID_BYTES = 12
_NONE = np.empty(0, np.int32)


class OpenSession:
    """One session and its state in the service. `lock` guards everything but the table's fields.

    Attributes:
        lock: Held by the thread that works with the session.
        proposing: The proposer's session.
        tail: int32, shape (n,). The last tokens of the text.
        tree: The last returned tree; None before the first, and after new tokens.
        last_at: Length of the text before `last_tokens`.
        last_tokens: int32, shape (m,). Tokens of the last step.
        last_accepted: Number of those that had been drafted.
        closed: Whether it has ended.
    """

    __slots__ = (
        "closed", "key", "last_accepted", "last_at", "last_tokens", "lock", "proposing", "tail", "tenant",
        "tokens", "tree", "used",
    )  # fmt: skip

    def __init__(
        self, key: str, tenant: str, proposing: ProposerSession, tail: TokenArray, tokens: int
    ) -> None:
        self.key, self.tenant, self.proposing = key, tenant, proposing
        self.lock = threading.Lock()
        self.tail = tail
        self.tree: DraftTree | None = None
        self.last_at, self.last_tokens, self.last_accepted = -1, _NONE, 0
        self.closed = False
        self.tokens = tokens
        self.used = 0.0


class SessionTable:
    """Sessions by name, the longest idle one first. Safe to use from several threads.

    Args:
        limits: Limits on open sessions.
        clock: Returns seconds of a monotonic clock.

    Attributes:
        limits: As given.
        tokens: Of all open sessions, and of those that are being opened.
    """

    def __init__(self, limits: SessionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._sessions: OrderedDict[str, OpenSession] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = 0
        self._by_tenant: Counter[str] = Counter()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def count(self, tenant: str) -> int:
        """Open sessions of a tenant."""
        return self._by_tenant[tenant]

    def reserve(self, tokens: int) -> None:
        """Reserves room for a session of so many tokens; `add` or `give_back` must follow.

        Raises:
            TooLargeError: It exceeds the limits on its own.
            ServiceFullError: There is no room now.
        """
        limits = self.limits
        if tokens > limits.max_session_tokens:
            raise TooLargeError(
                f"The session has {tokens} tokens; it may have {limits.max_session_tokens}.",
                "Pass less of the prompt, or fewer references.",
            )
        with self._lock:
            if len(self._sessions) + self._opening >= limits.max_sessions:
                raise ServiceFullError(
                    f"{limits.max_sessions} sessions are open, and no more may be.", "Close some, or wait."
                )
            self._check_room(tokens)
            self._opening += 1
            self.tokens += tokens

    def give_back(self, tokens: int) -> None:
        """Releases a reservation whose session is not opened."""
        with self._lock:
            self._opening -= 1
            self.tokens -= tokens

    def add(self, tenant: str, proposing: ProposerSession, tail: TokenArray, tokens: int) -> OpenSession:
        """Adds a session with a reservation, under a new name. `tail` is int32, the end of its text."""
        session = OpenSession(secrets.token_urlsafe(_ID_BYTES), tenant, proposing, tail, tokens)
        with self._lock:
            self._opening -= 1
            session.used = self._clock()
            self._sessions[session.key] = session
            self._by_tenant[tenant] += 1
        return session

    def get(self, tenant: str, key: str) -> OpenSession:
        """A tenant's session; it counts as used.

        Raises:
            UnknownSessionError: The tenant has no such session.
        """
        with self._lock:
            session = self._sessions.get(key)
            if session is None or session.tenant != tenant:
                raise unknown(key)
            session.used = self._clock()
            self._sessions.move_to_end(key)
        return session

    def grow(self, session: OpenSession, tokens: int) -> None:
        """Counts new tokens of a session.

        Raises:
            TooLargeError: The session would be too long.
            ServiceFullError: All sessions together would be.
        """
        if not tokens:
            return
        with self._lock:
            if session.key not in self._sessions:
                raise unknown(session.key)
            most = self.limits.max_session_tokens
            if session.tokens + tokens > most:
                raise TooLargeError(
                    f"The session would have {session.tokens + tokens} tokens; it may have {most}."
                )
            self._check_room(tokens)
            session.tokens += tokens
            self.tokens += tokens

    def shrink(self, session: OpenSession, tokens: int) -> None:
        """Uncounts tokens that were not appended."""
        with self._lock:
            if session.key in self._sessions:
                session.tokens -= tokens
                self.tokens -= tokens

    def remove(self, session: OpenSession) -> bool:
        """Removes a session; False if it was not in the table."""
        with self._lock:
            return self._remove(session)

    def expired(self) -> list[OpenSession]:
        """Removes and returns the sessions that were idle for too long."""
        over = []
        with self._lock:
            end = self._clock() - self.limits.idle_seconds
            for session in self._sessions.values():
                if session.used > end:
                    break
                over.append(session)
            for session in over:
                self._remove(session)
        return over

    def all(self) -> list[OpenSession]:
        """Every open session."""
        with self._lock:
            return list(self._sessions.values())

    def _remove(self, session: OpenSession) -> bool:
        if self._sessions.pop(session.key, None) is None:
            return False
        self.tokens -= session.tokens
        self._by_tenant[session.tenant] -= 1
        if not self._by_tenant[session.tenant]:
            del self._by_tenant[session.tenant]
        return True

    def _check_room(self, tokens: int) -> None:
        most = self.limits.max_tokens
        if self.tokens + tokens > most:
            raise ServiceFullError(
                f"The open sessions have {self.tokens} tokens, and {tokens} more would pass {most}.",
                "Close some, or wait.",
            )


def unknown(key: str) -> UnknownSessionError:
    """The error for a session that is not open."""
    return UnknownSessionError(
        f"There is no session {key!r}.", "It was closed, or not used for too long. Open another one."
    )
