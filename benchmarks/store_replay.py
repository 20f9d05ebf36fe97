"""Traces split over several servers that share a store, against one server that sees everything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from retrieval_draft.bench.replay import Counts, Replayer, Trace, read_traces
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

__all__ = ["measure_split"]

_SECONDS = 10.0


def measure_split(
    paths: Sequence[Path], url: str, *, servers: int = 4, nodes: int = 60, limit: int | None = None
) -> dict[str, Any]:
    """Replays traces in their order, each on the next of `servers`, with and without a store.

    Args:
        paths: Trace files.
        url: Of the store.
        servers: Number of servers, in turn.
        nodes: Draft nodes of every step.
        limit: Replay only so many requests.

    Returns:
        Tokens per step of one server that sees everything, of several that share nothing, that share
        replies, and of several that share prompts too; and the ratio of the last to the first.
    """
    traces = list(islice(read_traces(paths), limit))
    if not traces:
        raise InvalidInputError("There is no request to replay.", "Name traces with --traces.")
    vocabulary = max(int(ids.max(initial=0)) for trace in traces for ids in (trace.prompt, trace.output)) + 1
    one, _ = _replay(traces, vocabulary, 1, nodes, None, "none")
    alone, _ = _replay(traces, vocabulary, servers, nodes, None, "none")
    replies, _ = _replay(traces, vocabulary, servers, nodes, url, "reply")
    everything, accepted = _replay(traces, vocabulary, servers, nodes, url, "all")
    return {
        "one_server": one,
        "not_shared": alone,
        "replies_shared": replies,
        "all_shared": everything,
        "ratio": everything / one,
        "accepted_by_level": accepted,
        "servers": servers,
        "requests": len(traces),
        "nodes": nodes,
    }


def _replay(
    traces: Sequence[Trace], vocabulary: int, servers: int, nodes: int, url: str | None, share: str
) -> tuple[float, dict[str, int]]:
    """Tokens per step over all servers, and accepted tokens by level."""
    config = DraftConfig(nodes=nodes)
    tenant = f"replay-{share}-{time.time_ns()}"
    stores: list[SharedStore | None] = [
        None
        if url is None
        else SharedStore(StoreConfig(url, tenant=tenant, share=share), "replay", vocabulary)
        for _ in range(servers)
    ]
    replayers = [
        Replayer(config, nodes, True, DraftStores(vocabulary, shared=store), Calibration())
        for store in stores
    ]
    total = Counts()
    try:
        for number, trace in enumerate(traces):
            counts = replayers[number % servers].run(trace)
            total.tokens += counts.tokens
            total.steps += counts.steps
            store = stores[number % servers]
            if store is not None:
                store.share(trace.prompt, trace.output)
                store.flush()
                _wait([each for each in stores if each is not None], store)
    finally:
        for replayer in replayers:
            replayer.close()
        for store in stores:
            if store is not None:
                store.close()
    accepted: dict[str, int] = {}
    for replayer in replayers:
        for level, count in replayer.accepted.items():
            accepted[level] = accepted.get(level, 0) + count
    return total.tokens_per_step, accepted


def _wait(stores: Sequence[SharedStore], sender: SharedStore) -> None:
    """Waits until all have the entries that one has sent; a real request takes longer than that."""
    end = time.monotonic() + _SECONDS
    while any(each.mirror.entries < sender.mirror.entries for each in stores):
        if time.monotonic() > end:
            raise DatastoreError("Servers do not receive what one of them sent.", "Look at the store.")
        time.sleep(0.0005)
