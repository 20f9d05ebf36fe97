"""Bytes over a socket, for what no client library would send."""

from __future__ import annotations

import json
import socket
from typing import Any

__all__ = ["answers", "exchange", "post"]


def exchange(address: tuple[str, int], *pieces: bytes, seconds: float = 5.0) -> bytes:
    """The bytes that come back until the server closes, or is silent for so long."""
    got = b""
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            while more := connection.recv(65536):
                got += more
        except OSError:
            pass
    return got


def answers(address: tuple[str, int], *pieces: bytes, seconds: float = 5.0) -> list[int]:
    """The status of each answer that comes back."""
    lines = exchange(address, *pieces, seconds=seconds).split(b"HTTP/1.1 ")[1:]
    return [int(line[:3]) for line in lines]


def post(path: str, body: Any, *headers: str, version: str = "1.1", framing: bool = True) -> bytes:
    """A request with a JSON body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: test", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    if framing:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content
