"""Round trips of the drafting service: a client and a server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child_process import stop_process
from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.replay import Trace, read_traces
from retrieval_draft.draft_service.client import Draft, DraftClient, RemoteSession
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

__all__ = ["measure_draft_service", "serving"]

_START_SECONDS = 180.0


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """Runs ``retrieval-draft drafts serve`` until the block is left.

    Args:
        *options: Of the command.

    Yields:
        The server's URL.

    Raises:
        RetrievalDraftError: It did not start.
    """
    words = [sys.executable, "-m", "retrieval_draft.cli", "drafts", "serve", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # ends when the process does
        if not line.startswith("Drafts at "):
            raise RetrievalDraftError("The drafting service did not start.", "Its own words stand above.")
        yield line.removeprefix("Drafts at ").strip()
    finally:
        stop_process(process)
        process.stdout.close()


def measure_draft_service(
    traces: Sequence[Path],
    *,
    nodes: int = 60,
    pause: float = 0.0,
    limit: int | None = None,
    together: int = 64,
) -> dict[str, Any]:
    """Replays recorded replies through the service, over TCP and a unix socket in turn.

    The client accepts the nodes that continue the recorded reply, as an engine would, and requests the next
    tree in the same round trip. With a pause it waits before that, as for the pass of an engine's model: the
    service does its deferred work then, and processor caches are cold.

    Args:
        traces: Files of recorded requests.
        nodes: Draft nodes of each step.
        pause: Milliseconds that the engine's model takes; 0 for the next step at once.
        limit: Only so many requests.
        together: Sessions in one call, for the last part.

    Raises:
        InvalidInputError: There is no trace.
    """
    requests = list(islice(read_traces(traces), limit))
    if not requests:
        raise InvalidInputError("There are no requests in the traces.")
    vocabulary = 1 + max(int(max(each.prompt.max(), each.output.max())) for each in requests)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--vocabulary", str(vocabulary))
        socket = str(Path(folder) / "drafts.sock")
        with (
            serving(*options, "--port", "0") as tcp,
            serving(*options, "--unix-socket", socket) as unix,
            DraftClient(tcp, timeout=30.0) as far,
            DraftClient(unix, timeout=30.0) as near,
        ):
            seconds: dict[str, list[float]] = {"tcp": [], "unix": []}
            opening: dict[str, list[float]] = {"tcp": [], "unix": []}
            counts = [0, 0, 0]
            for request in requests:
                for name, client in (("tcp", far), ("unix", near)):
                    _replay(client, request, nodes, pause / 1000, seconds[name], opening[name], counts)
            batch = {
                name: _together(client, requests, nodes, together)
                for name, client in (("tcp", far), ("unix", near))
            }
    tokens, steps, drafted = counts
    return {
        "step_us": {name: _microseconds(found) for name, found in seconds.items()},
        "open_us": {name: _microseconds(found) for name, found in opening.items()},
        "batch_us": {name: _microseconds(found) for name, found in batch.items()},
        "batch_sessions": together,
        "service_us": _alone(requests, nodes, pause / 1000, vocabulary),
        "tokens_per_step": tokens / steps,
        "nodes_per_step": drafted / steps,
        "steps": steps,
        "requests": len(requests),
        "nodes": nodes,
        "pause_ms": pause,
        **provenance(),
    }


def _replay(
    client: DraftClient,
    request: Trace,
    nodes: int,
    pause: float,
    seconds: list[float],
    opening: list[float],
    counts: list[int],
) -> None:
    output = request.output.tolist()
    begin = time.perf_counter()
    session = client.open(request.prompt)
    opening.append(time.perf_counter() - begin)
    emitted, done = output[:1], 1
    while done < len(output):
        begin = time.perf_counter()
        draft = session.step(emitted, nodes=nodes)
        seconds.append(time.perf_counter() - begin)
        if pause > 0:
            time.sleep(pause)
        emitted = accepted(draft, output[done:])
        done += len(emitted)
        counts[0] += len(emitted)
        counts[1] += 1
        counts[2] += draft.num_draft_tokens
    session.close(tokens=emitted)


def accepted(draft: Draft, rest: Sequence[int]) -> list[int]:
    """Tokens that a model with the reply `rest` emits: its path in the tree, and one token more."""
    at, taken = 0, 0
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(draft.parents, draft.tokens, strict=True))
    }
    while taken < len(rest):
        at = children.get((at, rest[taken]), -1)
        taken += 1
        if at < 0:
            break
    return list(rest[:taken])


def _together(client: DraftClient, requests: Sequence[Trace], nodes: int, count: int) -> list[float]:
    """Steps of many sessions in one call, until the first has ended."""
    seconds = []
    rows: list[tuple[RemoteSession, list[int]]] = []
    for number in range(count):
        request = requests[number % len(requests)]
        rows.append((client.open(request.prompt), request.output.tolist()))
    emitted = [output[:1] for _, output in rows]
    done = [1] * count
    for _ in range(50):
        begin = time.perf_counter()
        drafts = client.step(list(zip((row for row, _ in rows), emitted, strict=True)), nodes=nodes)
        seconds.append(time.perf_counter() - begin)
        for number, (draft, (_, output)) in enumerate(zip(drafts, rows, strict=True)):
            emitted[number] = accepted(draft, output[done[number] :])
            done[number] += len(emitted[number])
    for session, _ in rows:
        session.close(finished=False)
    return seconds


def _alone(requests: Sequence[Trace], nodes: int, pause: float, vocabulary: int) -> dict[str, float]:
    """The same work without a network, the lower bound of a round trip."""
    from retrieval_draft.proposer import Proposer

    seconds = []
    with Proposer.for_tokenizer(None, vocabulary=vocabulary) as proposer:
        proposer.warm_up()
        for request in requests:
            session = proposer.open(request.prompt)
            emitted, done = request.output[:1], 1
            while done < len(request.output):
                begin = time.perf_counter()
                session.observe(emitted, later=True)
                tree = session.propose(nodes)
                seconds.append(time.perf_counter() - begin)
                session.apply_feedback()
                if pause > 0:
                    time.sleep(pause)
                rest = request.output[done:]
                emitted = rest[: len(tree.walk(rest))]
                done += len(emitted)
            session.close()
    return _microseconds(seconds)


def _microseconds(seconds: Sequence[float]) -> dict[str, float]:
    return percentiles(np.multiply(seconds, 1e6), 50, 90, 99)
