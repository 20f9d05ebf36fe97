"""Lets other threads run Python while this one works through a batch."""

from __future__ import annotations

import time

__all__ = ["GilYielder"]

HOLD = 60e-6
"""Seconds of Python at a stretch. A thread that decodes waits no longer for the interpreter; without that it
would wait for the switch interval, five milliseconds."""

_REST = 100e-6
"""Long enough for a thread that waits for the interpreter to wake up and take it."""


class GilYielder:
    """Lets other threads run: `yield_gil`, called every few microseconds, sleeps a moment when due."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def rested(self) -> None:
        """The thread has just waited for something else."""
        self._since = time.perf_counter()

    def yield_gil(self) -> None:
        """Sleeps if it is time to. Letting go and taking up again at once would wake nobody."""
        if time.perf_counter() - self._since > HOLD:
            time.sleep(_REST)
            self._since = time.perf_counter()
