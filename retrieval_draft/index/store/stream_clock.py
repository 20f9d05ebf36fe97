"""The time at which entries of a stream count, whatever clock was wrong."""

from __future__ import annotations

__all__ = ["SLACK", "StreamClock"]

SLACK = 2.0
"""Seconds by which ids may fall behind our own clock: no entry takes so long to be read once the log has been
read to its end, and the burst of a `RateLimit` bridges it."""


LEAP = 1e6
"""Seconds that one entry may move time by: an id may be of any year, and sums of seconds must stay exact."""


class StreamClock:
    """Time that passes in one stream: as its ids say, and where these stand still, as our own clock says.

    Ids are of Redis' clock, so readers of one log decide alike. But they stand still for as long as that was
    ahead once, or anybody wrote one entry with an id in the future. Neither clock can stop time alone, and a
    jump of either does no more than fill a bucket once.

    Example:
        entries of seconds 100 and 101, then one from a day ahead: 0, 1, 86401; with the same id, read 10 and
        11 seconds later by our own clock: 86409, 86410
    """

    __slots__ = ("_id", "_own", "_read", "_time")

    def __init__(self) -> None:
        self._id: float | None = None  # of the newest entry
        self._read = 0.0  # our own clock then
        self._own = 0.0  # the time our own clock makes it; ids may run ahead of that, and take it along
        self._time = 0.0

    def restart(self) -> None:
        """It is another stream from here on, whose ids may be lower; time does not go back."""
        self._id = None

    def at(self, seconds: float, now: float) -> float:
        """The time of an entry, in seconds since the first; never earlier than that of the one before.

        Args:
            seconds: Of its id. One below the newest so far was read before, and moves nothing.
            now: Our own clock.
        """
        if self._id is None:
            self._id, self._read, self._own = seconds, now, self._time
            return self._time
        if seconds >= self._id:
            self._own += max(now - self._read, 0.0)
            self._read = now
            ids = self._time + min(seconds - self._id, LEAP)
            self._id = seconds
            self._own = max(self._own, ids)
            self._time = max(ids, self._own - SLACK)
        return self._time
