"""Releases the GIL regularly during long work in Python, for threads that decode."""

from __future__ import annotations

import time

__all__ = ["GilYielder"]

HOLD = 60e-6
"""Seconds for which a thread holds the GIL. A thread that decodes waits no longer for it; otherwise it would
wait for the switch interval, five milliseconds."""

_REST = 100e-6
"""Seconds in which a waiting thread wakes up and takes the GIL."""


class GilYielder:
    """Sleeps briefly after `HOLD` seconds of work. Call `yield_gil` every few microseconds of work."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def rested(self) -> None:
        """Restarts the interval, after a wait for something else."""
        self._since = time.perf_counter()

    def yield_gil(self) -> None:
        """Sleeps if the interval is over. Releasing the GIL and taking it at once would wake no thread."""
        if time.perf_counter() - self._since > HOLD:
            time.sleep(_REST)
            self._since = time.perf_counter()
