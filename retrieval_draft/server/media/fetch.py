"""Files from the network, for a client that may not reach the server's own network with them."""

from __future__ import annotations

import http.client
import ipaddress
import queue
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from retrieval_draft.server.errors import ApiError

__all__ = ["Fetcher", "is_public"]

_REDIRECTS = 3
_PIECE = 1 << 16
_MOVED = (301, 302, 303, 307, 308)
_INNER = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""Addresses of IPv6 that stand for ones of IPv4, besides those that the standard library knows."""


def is_public(address: str) -> bool:
    """True if an IP address is one of the public internet, and stands for no other.

    Args:
        address: As of ``getaddrinfo``.
    """
    try:
        found = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = (found.ipv4_mapped, found.sixtofour, found.teredo)
        if any(inner) or any(found in network for network in _INNER) or int(found) < 1 << 32:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


class Fetcher:
    """Fetches files by http and https, of public addresses alone, in limited time and size.

    A name is resolved once for each request, all of its addresses are checked, and the connection is made to
    a checked address: so that no second answer of the name's server can lead elsewhere. Redirects begin anew.

    Args:
        max_bytes: Of a file.
        seconds: For a file, redirects included.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self._max_bytes, self._seconds = max_bytes, seconds

    def get(self, url: str) -> bytes:
        """The content of a file.

        Raises:
            ApiError: It cannot be had, or not within the limits (400); the message names no address.
        """
        end = monotonic() + self._seconds
        for _ in range(_REDIRECTS + 1):
            found = self._request(url, end)
            if isinstance(found, bytes):
                return found
            url = found
        raise _refusal(f"It is redirected more than {_REDIRECTS} times.")

    def _request(self, url: str, end: float) -> bytes | str:
        """Content, or the URL that it has moved to."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise _refusal("Its URL is invalid.") from error
        if parts.scheme not in ("http", "https") or not host:
            raise _refusal("Its URL begins with neither http:// nor https://.")
        if parts.username is not None or any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
            raise _refusal("Its URL has a user, spaces or letters beyond ASCII.")
        port = port or (443 if parts.scheme == "https" else 80)
        addresses = self.resolve(host, port, end)
        if not addresses or not all(map(self.allows, addresses)):
            raise _refusal("Its host has no public address.")
        try:
            with closing(self._connect(parts, host, port, addresses[0], end)) as connection:
                return self._exchange(connection, url, parts, end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refusal(f"It was not received within {self._seconds:g} s, or not whole.") from error

    def resolve(self, host: str, port: int, end: float) -> Sequence[str]:
        """Addresses of a host, in any form that the system's resolver takes."""
        answers: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                answers.put([str(each[4][0]) for each in found])
            except (OSError, UnicodeError):
                answers.put([])

        # The system's resolver has no time limit of its own.
        threading.Thread(target=ask, name="retrieval-draft-resolve", daemon=True).start()
        try:
            return answers.get(timeout=_left(end))
        except (queue.Empty, TimeoutError):
            return []

    def allows(self, address: str) -> bool:
        """True if the address may be connected to."""
        return is_public(address)

    def _connect(
        self, parts: SplitResult, host: str, port: int, address: str, end: float
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, port, timeout=_left(end))
        connection.sock = socket.create_connection((address, port), _left(end))
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
            except BaseException:
                connection.sock.close()
                raise
        return connection

    def _exchange(
        self, connection: http.client.HTTPConnection, url: str, parts: SplitResult, end: float
    ) -> bytes | str:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "User-Agent": "retrieval-draft",
            "Accept": "image/*, audio/*",
            "Accept-Encoding": "identity",
        }
        watch = threading.Timer(_left(end), _shut, [connection.sock])  # headers may come byte by byte
        watch.daemon = True
        watch.start()
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status in _MOVED and (where := response.headers.get("Location")):
                return urljoin(url, where)
            if response.status != 200:
                raise _refusal(f"Its server answers {response.status}.")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _refusal("Its server sends it compressed although that was not asked for.")
            content, whole = bytearray(), response.length
            while piece := response.read1(_PIECE):
                content += piece
                if len(content) > self._max_bytes:
                    raise _refusal(f"It has more than {self._max_bytes} bytes.")
                _left(end)
            _left(end)
            if whole is not None and len(content) != whole:
                raise ValueError("torn")
            return bytes(content)
        finally:
            watch.cancel()


def _left(end: float) -> float:
    left = end - monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _refusal(reason: str) -> ApiError:
    return ApiError(400, f"A file cannot be fetched. {reason}", "messages")
