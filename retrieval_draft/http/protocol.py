"""HTTP/1 of uvicorn with bounded heads and declined upgrades."""

from __future__ import annotations

import sys
from asyncio import TimerHandle
from collections.abc import MutableMapping
from functools import partial
from typing import Any

import httptools
import msgspec
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from retrieval_draft.http.json_response import error_body

__all__ = ["HEAD_BYTES", "HEAD_SECONDS", "BoundedProtocol", "http_config"]

HEAD_BYTES = 64 << 10
"""Largest size of the request line and headers of one request."""

HEAD_SECONDS = 30.0
"""Limit in seconds from the first byte, or from the connection, to the end of a head."""

_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}
_FRAMING = (b"content-length", b"transfer-encoding")


class BoundedProtocol(HttpToolsProtocol):
    """A connection of an untrusted client.

    * A head longer than `HEAD_BYTES` is answered with 431, one that takes longer than `HEAD_SECONDS` ends the
      connection, and so does a silent connection.
    * An offer to upgrade (``Upgrade: h2c``) is declined: the request and its body are read as if it had not
      been made, so that no body is ever taken for the next request.
    * Data that is not HTTP ends the connection once the requests before it are answered.
    * A client of HTTP/1.0 gets bodies without chunks, and no body follows a HEAD.
    """

    _in_head = True
    _head_bytes = 0
    _counted = 0
    _too_long = False
    _resumes = False
    _bad = False
    _head_timer: TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No method of this object: in a circle, it would hold its last request until a collection.
        self.app = partial(_serve, self.app)

    def connection_made(self, transport: Any) -> None:
        """Handles a new connection."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handles the loss of the connection."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handles bytes of requests."""
        if self._bad or self.transport.is_closing():
            return
        if self._in_head:
            self._counted += len(data)
            if self._head_timer is None:
                self._await_head()
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            if self._too_long:
                self._refuse(431, f"The head of the request has more than {HEAD_BYTES} bytes.")
            else:
                self._refuse(400, "This is no valid HTTP request.")
            return
        if self._in_head and self._counted > HEAD_BYTES:
            self._refuse(431, f"The head of the request has more than {HEAD_BYTES} bytes.")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # The parser has stopped after the head. Another one continues from there: it gets a head with the
            # same framing of the body and without the offer.
            rest = data[offer.args[0] :]
            framing = [name + b": " + value for name, value in self.headers if name in _FRAMING]
            last = self.parser.should_keep_alive()
            self.parser = httptools.HttpRequestParser(self)
            self._resumes = True
            ending = [] if last else [b"connection: close"]
            self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, *ending, b"", b""]))
            if rest:
                self._feed(rest)

    def on_message_begin(self) -> None:
        """Handles the begin of a request."""
        if self._resumes:
            return
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Handles a part of the request's target."""
        if not self._resumes:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handles one header."""
        if not self._resumes:
            self._count(len(name) + len(value) + 4)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handles the end of a head."""
        if self._resumes:
            self._resumes = False
            return
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("There is no way through.")
        self._in_head = False
        self._head_is_there()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Handles the end of a request."""
        if self.parser.should_upgrade():
            return  # its body is still to be read
        self._in_head, self._counted = True, 0
        self._head_is_there()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Handles the end of an answer."""
        super().on_response_complete()
        if not self._in_head and not self.transport.is_closing():
            self._await_head()  # the rest of the body is read, for a limited time

    def _should_upgrade(self) -> bool:
        return False

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES:
            self._too_long = True
            raise ValueError("The head is too long.")

    def _await_head(self) -> None:
        self._head_is_there()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._end()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end(self) -> None:
        """Closes the connection, after the running answers."""
        self._bad = True
        if self._is_answering:
            self.flow.pause_reading()
            self.cycle.keep_alive = False
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers an invalid request, unless another answer is being sent, into which this one would fall."""
        self._head_is_there()
        if self._is_answering and self.cycle.more_body:
            # The body of this request is wrong: the application must not wait for its rest.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()
                self._bad = True
                return
            if self.cycle.response_started:
                self._bad = True
                self.transport.close()
                return
            self.cycle.response_complete = True
        if not self._is_answering and not self.transport.is_closing():
            body = msgspec.json.encode(error_body(status, message))
            head = (
                b"HTTP/1.1 %d %s",
                b"content-type: application/json",
                b"content-length: %d",
                b"connection: close",
            )
            self.transport.write(
                b"\r\n".join((*head, b"", b"")) % (status, _REASONS[status], len(body)) + body
            )
        self._end()


async def _serve(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Runs an application; a client of HTTP/1.0 gets no chunks."""
    if scope.get("http_version") != "1.0":
        await app(scope, receive, send)
        return
    cycle: Any = send.__self__  # uvicorn sends by a method of the object that reads the body

    async def bare(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                # The end of the connection is the end of the body.
                cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
        elif cycle.expected_content_length > sys.maxsize >> 1 and not message.get("more_body"):
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, bare)


def http_config(app: Any, **options: Any) -> Config:
    """A configuration of uvicorn with `BoundedProtocol` and no other protocol.

    Args:
        app: The ASGI application.
        **options: Of `uvicorn.Config`.
    """
    settings: dict[str, Any] = {"lifespan": "on", "access_log": False, "server_header": False, **options}
    return Config(app, http=BoundedProtocol, ws="none", **settings)
