"""A minimal kept-alive HTTP connection, for round trips of a millisecond."""

from __future__ import annotations

import socket
import ssl
import time
from urllib.parse import unquote, urlsplit

from retrieval_draft.draft_service.errors import ServiceUnavailableError
from retrieval_draft.errors import InvalidInputError

__all__ = ["Address", "Connection"]

_READ = 1 << 16
_MAX_HEAD = 1 << 16
_MAX_BODY = 1 << 28


class Address:
    """Address of a service.

    Args:
        url: ``http://HOST[:PORT]``, ``https://...`` or ``unix:///PATH/TO/SOCKET``.

    Raises:
        InvalidInputError: It is none of these.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.path = unquote(parts.path) if parts.scheme == "unix" else ""
        self.host = parts.hostname or ""
        self.secure = parts.scheme == "https"
        valid = bool(self.path) and not self.host if parts.scheme == "unix" else bool(self.host)
        try:
            port = parts.port
        except ValueError:
            valid, port = False, None
        if parts.scheme not in ("http", "https", "unix") or not valid:
            raise InvalidInputError(
                f"{url!r} is no address of a drafting service.", "Use http://HOST:PORT or unix:///PATH."
            )
        self.port = port or (443 if self.secure else 80)
        self.prefix = "" if self.path else parts.path.rstrip("/")

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket."""
        if self.path:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(timeout)
                made.connect(self.path)
            except BaseException:
                made.close()
                raise
            return made
        made = socket.create_connection((self.host, self.port), timeout)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.secure:
            try:
                return ssl.create_default_context().wrap_socket(made, server_hostname=self.host)
            except BaseException:
                made.close()
                raise
        return made


class Connection:
    """A connection for a sequence of requests and answers. One thread at a time may use it.

    Args:
        address: The service's.
        headers: Lines that every request has, each with its end.
        timeout: Seconds to connect.
    """

    def __init__(self, address: Address, headers: str, timeout: float) -> None:
        self._socket = address.connect(timeout)
        host = "localhost" if address.path else address.host
        self._prefix = address.prefix
        self._headers = f"Host: {host}\r\n{headers}"

    def exchange(self, method: str, path: str, body: bytes, deadline: float) -> tuple[int, bytes]:
        """One round trip: status and body.

        Args:
            method: GET or POST.
            path: Below the address.
            body: To send.
            deadline: By ``time.monotonic()``.

        Raises:
            ServiceUnavailableError: The answer is not supported HTTP.
            OSError: The connection broke, or the deadline has passed.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        self._wait_until(deadline)
        self._socket.sendall(head.encode("latin-1") + body)
        data = b""
        end = -1
        while end < 0:
            data += self._receive(deadline)
            end = data.find(b"\r\n\r\n")
            if end < 0 and len(data) > _MAX_HEAD:
                raise ServiceUnavailableError("The answer's header does not end.")
        status, length, self.reusable = _head(data[:end])
        parts = [data[end + 4 :]]
        missing = length - len(parts[0])
        while missing > 0:
            parts.append(self._receive(deadline))
            missing -= len(parts[-1])
        if missing:
            raise ServiceUnavailableError("The answer is longer than it says.")
        return status, parts[0] if len(parts) == 1 else b"".join(parts)

    reusable = True
    """True if the service keeps the connection open."""

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _receive(self, deadline: float) -> bytes:
        self._wait_until(deadline)
        data = self._socket.recv(_READ)
        if not data:
            raise ConnectionResetError("the service hung up")
        return data

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        self._socket.settimeout(left)


def _head(head: bytes) -> tuple[int, int, bool]:
    """Status, length of the body, and whether the connection stays open."""
    lines = head.split(b"\r\n")
    words = lines[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ServiceUnavailableError("What answers is no HTTP service.")
    length, stays = -1, words[0] == b"HTTP/1.1"
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length" and value.strip().isdigit():
            length = int(value)
        elif name == b"connection":
            stays = value.strip().lower() != b"close"
    if not 0 <= length <= _MAX_BODY:
        raise ServiceUnavailableError("The answer does not say its length, or is too long.")
    return int(words[1]), length, stays
