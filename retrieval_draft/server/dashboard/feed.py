"""The feed of snapshots to open pages: always the latest one, to a limited number of pages."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from retrieval_draft.server.errors import ApiError

__all__ = ["Feed"]

_QUIET_SECONDS = 5.0
"""Seconds between comments while nothing changes: without them a closed page would go unnoticed."""

_log = logging.getLogger("retrieval_draft.server")


class _Subscriber:
    """One page. Holds the latest snapshot only, so that a slow reader costs no memory."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.latest = b""

    def offer(self, event: bytes) -> None:
        self.latest = event
        self.ready.set()


class Feed:
    """Makes snapshots for each watching tenant, at an interval, on a thread of its own.

    Args:
        snapshot: Returns the state that a tenant may see, plain types for JSON. Called on the feed's thread.
        is_over: Whether the server is about to stop, and streams are to end.
        idle: Called instead of `snapshot` while no page is open.
        seconds: Between two snapshots.
        most: Limit of subscribers.
    """

    def __init__(
        self,
        snapshot: Callable[[str], dict[str, Any]],
        is_over: Callable[[], bool],
        idle: Callable[[], object] = lambda: None,
        seconds: float = 0.25,
        most: int = 32,
    ) -> None:
        self._snapshot, self._is_over, self._idle = snapshot, is_over, idle
        self._seconds, self._most = seconds, most
        self._subscribers: set[_Subscriber] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retrieval-draft-dashboard", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and all streams."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def __len__(self) -> int:
        return len(self._subscribers)

    def subscribe(self, tenant: str) -> tuple[AsyncIterator[bytes], Callable[[], None]]:
        """Server-sent events for one page, and a function that ends them.

        Raises:
            ApiError: Too many pages are open (429).
        """
        subscriber = _Subscriber(tenant)
        with self._lock:
            if len(self._subscribers) >= self._most:
                raise ApiError(429, f"{self._most} dashboards are open already.", retry_after=10)
            self._subscribers.add(subscriber)
        return self._events(subscriber), lambda: self._leave(subscriber)

    async def _events(self, subscriber: _Subscriber) -> AsyncIterator[bytes]:
        sent, when = b"", 0.0
        while not (self._stopped.is_set() or self._is_over()):
            try:
                await asyncio.wait_for(subscriber.ready.wait(), 0.5)
            except asyncio.TimeoutError:
                continue
            subscriber.ready.clear()
            now = time.monotonic()
            if subscriber.latest != sent:
                sent, when = subscriber.latest, now
                yield sent
            elif now - when > _QUIET_SECONDS:
                when = now
                yield b":\n\n"

    def _leave(self, subscriber: _Subscriber) -> None:
        with self._lock:
            self._subscribers.discard(subscriber)

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._tick()
            except Exception:
                _log.exception("The dashboard's snapshot failed; the next may not.")
                self._stopped.wait(20 * self._seconds)

    def _tick(self) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        if not subscribers:
            self._idle()
            return
        made: dict[str, bytes] = {}
        for subscriber in subscribers:
            tenant = subscriber.tenant
            if tenant not in made:
                made[tenant] = b"data: " + msgspec.json.encode(self._snapshot(tenant)) + b"\n\n"
            try:
                subscriber.loop.call_soon_threadsafe(subscriber.offer, made[tenant])
            except RuntimeError:  # its loop has ended
                self._leave(subscriber)
