"""How many tokens a second one server may add to the log."""

from __future__ import annotations

__all__ = ["BURST", "RateLimit"]

BURST = 4.0
"""Seconds' worth of tokens that may come at once."""


class RateLimit:
    """A token bucket. Its clock is whatever the caller passes, so that every reader of a log decides alike.

    Args:
        rate: Tokens a second.

    Attributes:
        room: Tokens that may come now.

    Example:
        rate 100: 400 tokens at second 0 pass, 1 more does not; at second 1 another 100 do
    """

    __slots__ = ("_at", "_rate", "room")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._at: float | None = None
        self.room = rate * BURST

    def allows(self, tokens: int, seconds: float) -> bool:
        """Takes `tokens` out of the bucket if they are in it.

        Args:
            tokens: How many.
            seconds: The time; one earlier than the last counts as that.
        """
        self._fill(seconds)
        if tokens > self.room:
            return False
        self.room -= tokens
        return True

    def restart(self, seconds: float) -> None:
        """Goes on by another clock, which says `seconds` now."""
        self._at = seconds

    def wait(self, tokens: int, seconds: float) -> float:
        """Takes `tokens` out, and returns the seconds after which they may be sent; more than fit will do."""
        self._fill(seconds)
        self.room -= tokens
        return max(0.0, -self.room / self._rate)

    def _fill(self, seconds: float) -> None:
        if self._at is not None and seconds > self._at:
            self.room = min(self._rate * BURST, self.room + (seconds - self._at) * self._rate)
        self._at = seconds if self._at is None else max(self._at, seconds)
