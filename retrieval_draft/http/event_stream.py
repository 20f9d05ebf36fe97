"""A response of server-sent events to a client that may leave, or read too slowly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "unless_gone", "wait_disconnect"]

Result = TypeVar("Result")

_log = logging.getLogger("retrieval_draft.server")


async def wait_disconnect(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Result of `work`; None if the client hangs up before, and `work` is cancelled then.

    Args:
        receive: Receives events of the client, whose body has been read.
        work: The work to wait for.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, watcher):
            each.cancel()


class EventStream(Response):
    """Sends events until they end, the client leaves, or one of them cannot be sent in time.

    Args:
        events: Whole events, ``data: ...`` with an empty line after it.
        gone: Called when no more events are wanted, for any reason.
        seconds: Limit for sending one event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], object], seconds: float) -> None:
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # A stream has no length.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events, self._gone, self._seconds = events, gone, seconds
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the response."""
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(wait_disconnect(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        except asyncio.TimeoutError:
            _log.warning("A stream was not read for %g s, and is given up.", self._seconds)
        finally:
            self._ended = True
            self._gone()
            for task in (writer, watcher):
                task.cancel()
                with suppress(asyncio.CancelledError, asyncio.TimeoutError):
                    await task

    async def _write(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(head)
        async for event in self._events:
            body = {"type": "http.response.body", "body": event, "more_body": True}
            await asyncio.wait_for(send(body), self._seconds)
            if self._ended:  # before Python 3.12 wait_for loses a cancellation in the turn in which it ends
                return
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        await asyncio.wait_for(send(end), self._seconds)
