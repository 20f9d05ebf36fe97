"""State of the connection to Redis, with one log line for each change."""

from __future__ import annotations

import logging
import threading
import time

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, ResponseError

__all__ = ["STATES", "Health"]

STATES = ("connected", "connecting", "refusing", "unreachable", "denied", "closed")
"""``refusing``: Redis answers with errors, as when it is full or read-only. ``denied``: it does not accept
user or password, or the user lacks permissions."""

_MESSAGES = {
    "refusing": "refuses what is sent",
    "unreachable": "cannot be reached",
    "denied": "denies access",
}

_log = logging.getLogger("retrieval_draft")


class Health:
    """The worse of the states of sending and receiving.

    Args:
        store: Name of the store in log lines, without a password.

    Attributes:
        state: One of `STATES`.
        reason: Of the last failure; empty while connected.
        changes: Of state so far.
        since: Time of the last change, by ``time.time()``.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._states = {"sending": "connecting", "receiving": "connecting"}
        self._reasons: dict[str, str] = {}
        self._changed = threading.Condition()
        self.state = "connecting"
        self.reason = ""
        self.changes = 0
        self.since = time.time()

    def worked(self, channel: str) -> None:
        """Records that sending or receiving worked."""
        self._set(channel, "connected", "")

    def failed(self, channel: str, error: Exception) -> None:
        """Records that sending or receiving failed."""
        if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
            state = "denied"
        elif isinstance(error, ResponseError):
            state = "refusing"
        else:
            state = "unreachable"
        self._set(channel, state, str(error) or type(error).__name__)

    def close(self) -> None:
        """Ends logging."""
        with self._changed:
            self.state = "closed"
            self._changed.notify_all()

    def _set(self, channel: str, state: str, reason: str) -> None:
        with self._changed:
            if self.state == "closed":
                return
            self._states[channel], self._reasons[channel] = state, reason
            worst = max(self._states, key=lambda each: STATES.index(self._states[each]))
            state, self.reason = self._states[worst], self._reasons.get(worst, "")
            if state == self.state:
                return
            self.state = state
            self.changes += 1
            self.since = time.time()
            self._changed.notify_all()
            self._say(state)

    def _say(self, state: str) -> None:
        if state == "connected":
            _log.info("The store %s is connected.", self._store)
        elif state in _MESSAGES:
            _log.warning(
                "The store %s %s: %s. Drafting goes on from what is here; what is new waits to be sent.",
                self._store,
                _MESSAGES[state],
                self.reason.rstrip("."),
            )
