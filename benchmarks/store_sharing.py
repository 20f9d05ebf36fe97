"""Latency of sharing between servers, speed of ingesting, and warm-up time of a new server."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_fill import fill
from benchmarks.store_worker import FINGERPRINT, WorkerProcess, load_kernels
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft._progress import progress
from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

__all__ = ["measure_ingest", "measure_propagation", "measure_start"]

_RUN = 500
_SERVERS = 10


def measure_propagation(
    folder: Path, *, servers: int = 4, rounds: int = 200, vocabulary: int = 32000
) -> dict[str, Any]:
    """Measures the time from the end of a request on one server to a draft from it on the others.

    Servers are processes. Each request's reply is 200 random tokens, and a server counts from the call that
    ends the request to the moment at which another's session proposes the tokens after 40 of its tokens.

    Args:
        folder: For the store's data.
        servers: Number of servers.
        rounds: Requests, on the servers in turn.
        vocabulary: Number of token ids.

    Returns:
        Milliseconds, median and 99th percentile, over rounds and receiving servers: to a draft from the text,
        and in every other turn of the servers to a row in the matrix.
    """
    found: dict[bool, list[float]] = {False: [], True: []}
    lost = 0
    with ValkeyProcess(folder / "propagation") as server, ExitStack() as stack:
        config = {"url": server.url, "vocabulary": vocabulary}
        workers = [stack.enter_context(WorkerProcess(**config)) for _ in range(servers)]
        for number, worker in enumerate(workers):
            worker.call(do="share", seed=10**6 + number)
        for worker in workers:
            worker.call(do="open")
        with progress("Sharing (requests)", rounds, delay=0.0) as advance:
            for number in range(rounds):
                sender = workers[number % servers]
                others = [worker for worker in workers if worker is not sender]
                rows = number % (2 * servers) >= servers  # every server sends for both in turn
                for worker in others:
                    worker.ask(do="watch", seed=number, rows=rows)
                time.sleep(0.02)
                begin = sender.call(do="share", seed=number)["at"]
                for worker in others:
                    end = worker.answer()["at"]
                    if end is None:
                        lost += 1
                    else:
                        found[rows].append(1000 * (end - begin))
                advance()
    return {
        **percentiles(found[False], 50, 99, 100),
        **{f"rows_{name}": value for name, value in percentiles(found[True]).items()},
        "samples": len(found[False]) + len(found[True]),
        "lost": lost,
        "servers": servers,
    }


def measure_start(folder: Path, *, tokens: int = 10_000_000, vocabulary: int = 32000) -> dict[str, Any]:
    """Measures the time of a new server from opening the store to a lookup in all of a snapshot.

    Args:
        folder: For data and snapshots.
        tokens: Of the snapshot.
        vocabulary: Number of token ids.

    Returns:
        Seconds to the first lookup, and until the log after the snapshot had been read: medians of five new
        processes, each with its kernels loaded.
    """
    usable, ready = [], []
    with ValkeyProcess(folder / "start", append_only=False) as server:
        fill(server.url, vocabulary, tokens, _RUN, _SERVERS)
        config = {"url": server.url, "vocabulary": vocabulary, "snapshots": str(folder / "snapshots")}
        with WorkerProcess(**config) as worker:
            worker.call(do="open", seconds=120.0)
            info = worker.call(do="snapshot")
        for _ in range(5):
            with WorkerProcess(**config) as worker:
                found = worker.call(do="open")
            usable.append(found["usable_seconds"])
            ready.append(found["ready_seconds"])
    return {
        "usable_seconds": float(np.median(usable)),
        "ready_seconds": float(np.median(ready)),
        "tokens": info["tokens"],
        "nbytes": info["nbytes"],
        "found_tokens": found["tokens"],
        "ingested": found["ingested"],
    }


def measure_ingest(
    folder: Path, *, tokens: int = 20_000_000, vocabulary: int = 32000, nodes: int = 60
) -> dict[str, Any]:
    """Ingests the entries of ten servers, while a thread does the lookups of a decoding thread every 2 ms.

    Args:
        folder: For the store's data.
        tokens: Number of tokens to ingest.
        vocabulary: Number of token ids.
        nodes: Of each proposal.

    Returns:
        Tokens a second, and microseconds of a step (observing and proposing), while entries are ingested and
        afterwards: its duration, and the part of it in which the thread waited for the GIL or for a core.
    """
    load_kernels(vocabulary)
    text = SyntheticText(vocabulary).tokens(400_000, seed=99)
    with ValkeyProcess(folder / "ingest", append_only=False) as server:
        fill(server.url, vocabulary, tokens, _RUN, _SERVERS)
        with SharedStore(StoreConfig(server.url), FINGERPRINT, vocabulary) as store:
            source = SharedSource(store)
            begin = time.perf_counter()
            busy = _steps(source, text, nodes, lambda done: store.counts.ingested_tokens >= tokens)
            seconds = time.perf_counter() - begin
            store.flush()
            time.sleep(3.0)  # merging ends
            quiet = _steps(source, text, nodes, lambda done: done >= len(busy))
            ingested = store.counts.ingested_tokens
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": ingested,
        "steps": len(busy),
        "step_us": percentiles(busy[:, 0], 50, 99, 99.9, 100),
        "step_us_quiet": percentiles(quiet[:, 0], 50, 99, 99.9, 100),
        "held_us": percentiles(busy[:, 1], 50, 99, 99.9, 100),
        "held_us_quiet": percentiles(quiet[:, 1], 50, 99, 99.9, 100),
    }


def _steps(source: SharedSource, text: TokenArray, nodes: int, over: Any) -> Any:
    """Microseconds of each step, and of its part in which the thread did not run; shape (steps, 2)."""
    session = source.open(text[:32])
    found: list[tuple[float, float]] = []
    end = time.monotonic() + 300
    while not over(len(found)) and time.monotonic() < end:
        at = 32 + 2 * (len(found) % 100_000)
        ran, begin = time.thread_time(), time.perf_counter()
        session.observe(text[at : at + 2])
        session.propose(nodes)
        took = time.perf_counter() - begin
        found.append((1e6 * took, max(0.0, 1e6 * (took - (time.thread_time() - ran)))))
        time.sleep(0.002)
    return np.array(found)
