"""Names in Redis."""

from __future__ import annotations

import re

__all__ = ["SHARDS", "lock_key", "split_stream_key", "stream_key"]

SHARDS = 4
"""Streams of a namespace. A server writes to one and reads all; the number belongs to the format."""


_STREAM = re.compile(rb"rd:([A-Za-z0-9]{1,64}):([A-Za-z0-9._-]{1,64}):\{([0-9])\}:log")
"""Valid names; others are not shown on a terminal."""


def stream_key(namespace: str, shard: str) -> bytes:
    """A shard's stream; the braces let a Redis Cluster put shards on different nodes.

    Example:
        stream_key("1f..:acme", "2")  ->  b"rd:1f..:acme:{2}:log"
    """
    return f"rd:{namespace}:{{{shard}}}:log".encode()


def lock_key(namespace: str) -> str:
    """Key of the lock of the server that writes a snapshot."""
    return f"rd:{namespace}:{{0}}:snapshot-lock"


def split_stream_key(key: bytes) -> tuple[str, str, str] | None:
    """Fingerprint, tenant and shard of a stream's name; None for another name."""
    found = _STREAM.fullmatch(key)
    return None if found is None else (found[1].decode(), found[2].decode(), found[3].decode())
