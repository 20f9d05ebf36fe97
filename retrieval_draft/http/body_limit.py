"""Bounds of request bodies: their size, and the time to receive them."""

from __future__ import annotations

import asyncio
import sys
from time import monotonic

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BodyLimit", "bounded"]

_DRAINED_BYTES = 64 << 20
_DRAINED_SECONDS = 5.0
"""Seconds for which a long body is read and dropped first: a client that is still sending would not see the
answer."""


class BodyLimit:
    """Middleware that bounds the bodies that an application receives, as `bounded`.

    Args:
        app: The next application.
        limit: Bytes.
        seconds: Limit for receiving a body.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 60.0) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] == "http":
            receive = bounded(scope, receive, self._limit, self._seconds)
        await self._app(scope, receive, send)


def bounded(scope: Scope, receive: Receive, limit: int, seconds: float) -> Receive:
    """A `receive` that refuses a body that is too long, announced or not (413), or late (408).

    Args:
        scope: Of the request.
        receive: Receives its body.
        limit: Bytes.
        seconds: Limit for receiving all of it.

    Returns:
        The function, which raises Starlette's `HTTPException`.
    """
    length = dict(scope["headers"]).get(b"content-length", b"")
    too_long = length.isdigit() and int(length) > limit
    deadline, taken, more = monotonic() + seconds, 0, True

    async def checked() -> Message:
        nonlocal taken, more
        if not more:
            return await receive()
        message: Message = {}
        if not too_long:
            with _Alarm(deadline - monotonic()):
                message = await receive()
            if message["type"] != "http.request":
                return message
            more = bool(message.get("more_body"))
            taken += len(message.get("body", b""))
        if too_long or taken > limit:
            if more:
                await _drop(receive)
            raise HTTPException(413, f"The body has more than {limit} bytes; this server takes no more.")
        return message

    return checked


class _Alarm:
    """Ends a wait of this task that takes too long, at an eighth of the 30 us of `asyncio.wait_for`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._late = seconds, False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._ring)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._timer.cancel()
        if self._late and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11) and self._task is not None:
                self._task.uncancel()
            raise HTTPException(408, "The body did not come in time.")

    def _ring(self) -> None:
        if self._task is not None:
            self._late = True
            self._task.cancel()


async def _drop(receive: Receive) -> None:
    """Reads the rest of a body for a limited time, and drops it."""
    dropped, until = 0, monotonic() + _DRAINED_SECONDS
    while dropped < _DRAINED_BYTES and monotonic() < until:
        try:
            message = await asyncio.wait_for(receive(), max(until - monotonic(), 0.001))
        except asyncio.TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        dropped += len(message.get("body", b""))
