"""Requests to a port of this machine, each on a connection of its own."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["get_status", "got", "posted"]


def get_status(port: int, path: str = "/health", seconds: float = 10.0) -> int:
    """Status of a GET; 0 without an answer."""
    return got(port, path, seconds)[0]


def got(port: int, path: str, seconds: float = 10.0) -> tuple[int, bytes]:
    """Status and body of the response to a GET; 0 and nothing without one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@contextmanager
def posted(
    port: int, path: str, body: Any, headers: Mapping[str, str] | None = None, seconds: float = 300.0
) -> Iterator[http.client.HTTPResponse]:
    """The response to a POST of JSON, until the block is left.

    Args:
        port: On loopback.
        path: Of the request.
        body: Bytes, or what is written as JSON.
        headers: Further ones.
        seconds: Limit of the time without data.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", path, content, {"Content-Type": "application/json", **(headers or {})})
        yield connection.getresponse()
    finally:
        connection.close()
