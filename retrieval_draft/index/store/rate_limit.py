"""Limit of the tokens a second that one server may add to the log."""

from __future__ import annotations

__all__ = ["BURST", "RateLimit"]

BURST = 4.0
"""Seconds' worth of tokens that may arrive at once."""


class RateLimit:
    """A token bucket. The caller passes the time, so that every reader of a log decides the same.

    Args:
        rate: Tokens a second.

    Attributes:
        room: Tokens that may arrive now.

    Example:
        rate 100: 400 tokens at second 0 pass, 1 more does not; at second 1 another 100 do
    """

    __slots__ = ("_at", "_rate", "room")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._at: float | None = None
        self.room = rate * BURST

    def allows(self, tokens: int, seconds: float) -> bool:
        """Takes `tokens` out of the bucket if it holds as many.

        Args:
            tokens: Number of tokens.
            seconds: The time; one earlier than the last counts as that.
        """
        self._fill(seconds)
        if tokens > self.room:
            return False
        self.room -= tokens
        return True

    def restart(self, seconds: float) -> None:
        """Changes to another clock, which shows `seconds` now."""
        self._at = seconds

    def wait(self, tokens: int, seconds: float) -> float:
        """Takes `tokens` out, even more than there are, and returns the seconds until they may be sent."""
        self._fill(seconds)
        self.room -= tokens
        return max(0.0, -self.room / self._rate)

    def _fill(self, seconds: float) -> None:
        if self._at is not None and seconds > self._at:
            self.room = min(self._rate * BURST, self.room + (seconds - self._at) * self._rate)
        self._at = seconds if self._at is None else max(self._at, seconds)
