"""Names in Redis."""

from __future__ import annotations

__all__ = ["SHARDS", "lock_key", "split_stream_key", "stream_key"]

SHARDS = 4
"""Streams of a namespace. A server writes to one and reads all; the number belongs to the format."""


def stream_key(namespace: str, shard: str) -> bytes:
    """A shard's stream; the braces let a Redis Cluster put shards on different nodes.

    Example:
        stream_key("1f..:acme", "2")  ->  b"rd:1f..:acme:{2}:log"
    """
    return f"rd:{namespace}:{{{shard}}}:log".encode()


def lock_key(namespace: str) -> str:
    """What the server that writes a snapshot holds."""
    return f"rd:{namespace}:{{0}}:snapshot-lock"


def split_stream_key(key: bytes) -> tuple[str, str, str] | None:
    """Fingerprint, tenant and shard of a stream's name; None where it is no such name."""
    parts = key.decode("utf-8", "replace").split(":")
    if len(parts) != 5 or parts[0] != "rd" or parts[4] != "log":
        return None
    return parts[1], parts[2], parts[3].strip("{}")
