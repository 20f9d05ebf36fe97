"""Lateness of an event loop that has nothing to do: what a busy machine itself adds to a stall."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

__all__ = ["IdleLoop", "lateness"]

_PERIOD = 0.01


class IdleLoop:
    """An event loop in a process of its own that wakes every 10 ms, until the end of a ``with`` block.

    Attributes:
        late: Time of `time.monotonic` and seconds by which each waking was late; filled at the end.
    """

    def __init__(self) -> None:
        self.late: list[tuple[float, float]] = []

    def __enter__(self) -> IdleLoop:
        command = [sys.executable, "-m", "benchmarks.idle_loop"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *error: object) -> None:
        told, _ = self._process.communicate(timeout=60)
        self.late = [(at, seconds) for at, seconds in json.loads(told)]


async def lateness(ended: asyncio.Event) -> list[tuple[float, float]]:
    """Wakes until the event is set.

    Returns:
        The time of each waking, and by how many seconds it was late.
    """
    found = []
    while not ended.is_set():
        began = time.monotonic()
        await asyncio.sleep(_PERIOD)
        now = time.monotonic()
        found.append((now, now - began - _PERIOD))
    return found


async def _until_stdin_ends() -> list[tuple[float, float]]:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    return await lateness(ended)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(_until_stdin_ends())))
