"""Refusal of bodies that are too long, without keeping them."""

from __future__ import annotations

import asyncio
from time import monotonic

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_draft.server.auth import send_error
from retrieval_draft.server.errors import ApiError

__all__ = ["BodyLimit"]

_DRAINED_BYTES = 64 << 20
_DRAINED_SECONDS = 5.0
"""Seconds for which a long body is read and dropped first: a client that is still sending would not see the
answer."""


class BodyLimit:
    """Middleware that answers 413 to long bodies, announced or not.

    Args:
        app: The next application.
        limit: Bytes.
        seconds: Limit for receiving a body.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 60.0) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limit:
            await _drop(receive)
            await send_error(self._error(), send)
            return
        deadline, taken, more = monotonic() + self._seconds, 0, True

        async def counted() -> Message:
            nonlocal taken, more
            if not more:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - monotonic(), 0.001))
            except asyncio.TimeoutError:
                raise HTTPException(408, "The body did not come in time.") from None
            if message["type"] != "http.request":
                return message
            more = bool(message.get("more_body"))
            taken += len(message.get("body", b""))
            if taken > self._limit:
                if more:
                    await _drop(receive)
                raise HTTPException(413, self._error().message)
            return message

        await self._app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"The body has more than {self._limit} bytes; this server takes no more.")


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
