"""Waits between attempts."""

from __future__ import annotations

import random
import threading

__all__ = ["Backoff"]


class Backoff:
    """Doubling waits with jitter, so that many servers do not reconnect at once.

    Args:
        first: Seconds of the first wait.
        most: Seconds of the longest.

    Attributes:
        failures: Since the last success.
    """

    def __init__(self, first: float = 0.05, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self.failures = 0

    def reset(self) -> None:
        """Resets the wait after a success."""
        self.failures = 0

    def wait(self, stopped: threading.Event) -> None:
        """Waits, at most until `stopped`. The first failure costs no wait: it may be an old connection."""
        self.failures += 1
        if self.failures > 1:
            longest = min(self._most, self._first * 2.0 ** min(self.failures, 16))
            stopped.wait(random.uniform(longest / 2, longest))
