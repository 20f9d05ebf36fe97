"""Contents of a store: every namespace, its streams, and its writers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from redis.exceptions import NoPermissionError, ResponseError

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.connector import Connector
from retrieval_draft.index.store.keys import SHARDS, lock_key, split_stream_key, stream_key
from retrieval_draft.index.store.log_reader import edge_ids
from retrieval_draft.index.store.reconnecting_worker import FAILURES
from retrieval_draft.index.store.url import StoreURL

__all__ = ["NamespaceSurvey", "describe_store"]


class NamespaceSurvey(msgspec.Struct):
    """One namespace.

    Attributes:
        fingerprint: Of the tokenizer.
        tenant: The servers that share it.
        entries: Entries in all streams, with texts or with what was learned.
        nbytes: Their memory in Redis; None where it is not known.
        oldest: Milliseconds since the epoch of the oldest entry; None without one.
        newest: The same of the newest.
        streams: For each shard its entries.
        snapshotting: Whether a server is writing a snapshot.
    """

    fingerprint: str
    tenant: str
    entries: int = 0
    nbytes: int | None = 0
    oldest: int | None = None
    newest: int | None = None
    streams: dict[str, int] = {}
    snapshotting: bool = False


def describe_store(url: StoreURL, timeout: float = 2.0) -> tuple[Mapping[str, Any], list[NamespaceSurvey]]:
    """Lists the contents of a store, without changes.

    Args:
        url: Of the store.
        timeout: Seconds to wait for an answer.

    Returns:
        The server (version, memory, its limit, clients), and the namespaces.

    Raises:
        DatastoreError: It cannot be reached, or denies access.
    """
    with Connector(url, timeout) as connector:
        try:
            client = connector.client()
            try:
                names = {split_stream_key(key) for key in client.scan_iter(match="rd:*:log", count=1000)}
                spaces = sorted({name[:2] for name in names if name is not None})
                found = [_namespace(client, *space) for space in spaces]
                return _server(client, connector.is_cluster), found
            finally:
                client.close()
        except FAILURES as error:
            if isinstance(error, DatastoreError):
                raise
            raise DatastoreError(
                f"The store {url} cannot be read: {error}.", "Check that it runs, and user and password."
            ) from error


def _server(client: Any, is_cluster: bool) -> dict[str, Any]:
    try:
        if is_cluster:
            return {"nodes": len(client.get_nodes())}
        info = client.info()
    except NoPermissionError:
        return {}
    kind = info.get("server_name") or "redis"
    return {
        "version": f"{kind} {info.get('valkey_version') or info.get('redis_version')}",
        "role": info.get("role"),
        "used_memory": info.get("used_memory"),
        "maxmemory": info.get("maxmemory"),
        "append_only": bool(info.get("aof_enabled")),
        "clients": info.get("connected_clients"),
    }


def _namespace(client: Any, fingerprint: str, tenant: str) -> NamespaceSurvey:
    found = NamespaceSurvey(fingerprint, tenant, streams={})
    namespace = f"{fingerprint}:{tenant}"
    for shard in range(SHARDS):
        key = stream_key(namespace, str(shard))
        try:
            entries = int(client.xlen(key))
            ids = edge_ids(client, key) if entries else None
        except ResponseError:  # the key has another type
            continue
        found.streams[str(shard)] = entries
        found.entries += entries
        if ids is not None:
            first, last = (int(name.split(b"-")[0]) for name in ids)
            found.oldest = first if found.oldest is None else min(first, found.oldest)
            found.newest = last if found.newest is None else max(last, found.newest)
        try:
            used = client.memory_usage(key) if entries else 0
            found.nbytes = None if found.nbytes is None else found.nbytes + int(used or 0)
        except (NoPermissionError, ResponseError):
            found.nbytes = None
    found.snapshotting = bool(client.exists(lock_key(namespace)))
    return found
