"""The time of a stream's entries, robust against wrong clocks."""

from __future__ import annotations

__all__ = ["SLACK", "StreamClock"]

SLACK = 2.0
"""Seconds by which ids may lag our own clock: no entry takes so long to be read once the log has been read to
its end, and the burst of a `RateLimit` covers it."""


LEAP = 1e6
"""Seconds by which one entry may move time: an id may be of any year, and sums of seconds must stay exact."""


class StreamClock:
    """Time in one stream: by its ids, and while these stand still, by our own clock.

    Ids are of Redis' clock, so readers of one log decide the same. But they stand still for as long as that
    clock was ahead once, or after an entry with an id in the future. Neither clock can stop time alone, and a
    jump of either only fills a bucket once.

    Example:
        entries of seconds 100 and 101, then one from a day ahead: 0, 1, 86401; with the same id, read 10 and
        11 seconds later by our own clock: 86409, 86410
    """

    __slots__ = ("_id", "_own", "_read", "_time")

    def __init__(self) -> None:
        self._id: float | None = None  # of the newest entry
        self._read = 0.0  # our own clock then
        self._own = 0.0  # time by our own clock; ids may run ahead, and set it then
        self._time = 0.0

    def restart(self) -> None:
        """Continues with another stream, whose ids may be lower; time does not go back."""
        self._id = None

    def at(self, seconds: float, now: float) -> float:
        """The time of an entry, in seconds since the first; never earlier than that of the one before.

        Args:
            seconds: Of its id. One below the newest so far was read before, and leaves the time.
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
