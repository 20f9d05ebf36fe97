"""A server of the store's benches: a process with a store, controlled by lines on stdin.

``python -m benchmarks.store_worker CONFIG`` reads JSON objects from stdin, one a line, and answers
each with one on stdout. CONFIG is JSON too: {"url": ..., "vocabulary": ...}.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import SegmentSession
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import CONTEXT, NodeLogits, TokenArray
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

__all__ = ["FINGERPRINT", "WorkerProcess", "load_kernels", "numbered_run", "numbers_in", "probe_text"]

FINGERPRINT = "bench"
_POLL_SECONDS = 0.0003
_QUEUE = 4096
NUMBERED_TOKENS = 12
_BASE = 4096


def probe_text(seed: int, vocabulary: int, tokens: int = 200) -> TokenArray:
    """A random reply: int32, shape (tokens,)."""
    return np.random.default_rng((7, seed)).integers(0, vocabulary, tokens).astype(np.int32)


def numbered_run(server: int, number: int, vocabulary: int) -> TokenArray:
    """A run that encodes its server and its number: int32, shape (12,)."""
    run = np.random.default_rng((server, number)).integers(0, vocabulary, NUMBERED_TOKENS, np.int32)
    run[:3] = server, number // _BASE, number % _BASE
    return run


def numbers_in(store: SharedStore) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]]:
    """Numbers of the runs of each server that can be looked up here: int64, sorted, with repetitions."""
    rows = []
    for segment in store.segments:
        starts = segment.documents.astype(np.int64)
        rows.append(np.stack([segment.tokens[starts + column].astype(np.int64) for column in range(3)]))
    if not rows:
        return {}
    servers, high, low = np.concatenate(rows, axis=1)
    numbers = high * _BASE + low
    return {int(server): np.sort(numbers[servers == server]) for server in np.unique(servers)}


class WorkerProcess:
    """A worker process and its commands.

    Args:
        config: Configuration for `main`.

    Attributes:
        process: The worker.
    """

    module = "benchmarks.store_worker"

    def __init__(self, **config: Any) -> None:
        words = [sys.executable, "-m", self.module, json.dumps(config)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **command: Any) -> None:
        """Sends a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Waits for the next answer.

        Raises:
            DatastoreError: The process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DatastoreError(f"A server of the bench has ended with {self.process.wait()}.")
        return json.loads(line)

    def call(self, **command: Any) -> Any:
        """Sends a command and waits for its answer."""
        self.ask(**command)
        return self.answer()

    def kill(self) -> None:
        """Kills the process with SIGKILL."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        self._vocabulary = int(config.pop("vocabulary"))
        self._config = config
        load_kernels(self._vocabulary)
        self._store: SharedStore | None = None
        self.matrix = AdjacencyMatrix()
        self._thread: threading.Thread | None = None

    @property
    def store(self) -> SharedStore:
        """The store, opened on first use."""
        if self._store is None:
            self._store = SharedStore(StoreConfig(**self._config), FINGERPRINT, self._vocabulary)
            self._store.learned.attach(self.matrix)
        return self._store

    def open(self, seconds: float = 30.0) -> dict[str, Any]:
        """Opens the store, and makes a lookup as soon as all entries have been read."""
        begin = time.perf_counter()
        store = self.store
        while not store.segments and time.perf_counter() - begin < seconds:
            time.sleep(0.0002)
        session = SharedSource(store).open(probe_text(0, self._vocabulary)[:20])
        session.propose(60)
        usable = time.perf_counter() - begin
        ready = store.wait_ready(seconds)
        return {"ready": ready, "usable_seconds": usable, "ready_seconds": time.perf_counter() - begin,
                **store.status()}  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Counts of the store."""
        return self.store.status()

    def share(self, seed: int) -> dict[str, Any]:
        """Ends a request."""
        text = probe_text(seed, self._vocabulary)
        begin = time.monotonic()
        self.store._outbox.put(text[:0], text, _learned(text))
        return {"at": begin}

    def watch(self, seed: int, rows: bool = False, seconds: float = 10.0) -> dict[str, Any]:
        """Waits until another server's request is drafted from, or a matrix has a row of it."""
        text = probe_text(seed, self._vocabulary)
        if rows:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if text[0] in self.matrix.row(text[:CONTEXT])[0]:  # predicted there, though not the next
                    return {"at": time.monotonic()}
                time.sleep(_POLL_SECONDS)
            return {"at": None}
        session = SharedSource(self.store).open(text[:40])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if session.propose(8).tokens[:4].tolist() == text[40:44].tolist():
                return {"at": time.monotonic()}
            time.sleep(_POLL_SECONDS)
        return {"at": None}

    def add(self, server: int, first: int, count: int, progress: str) -> dict[str, Any]:
        """Shares runs in the background, and keeps the number that Redis accepted in a file."""
        file = Path(progress)
        file.write_bytes(bytes(8))
        handle = file.open("r+b")
        shown = mmap.mmap(handle.fileno(), 8)

        def work() -> None:
            for number in range(first, first + count):
                while len(self.store._outbox) >= _QUEUE:
                    shown[:] = self.store.counts.sent.to_bytes(8, "little")
                    time.sleep(0.001)
                run = numbered_run(server, number, self._vocabulary)
                self.store._outbox.put(run[:0], run, _learned(run))
            while self.store.counts.sent < count:
                shown[:] = self.store.counts.sent.to_bytes(8, "little")
                time.sleep(0.001)
            shown[:] = self.store.counts.sent.to_bytes(8, "little")

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return {}

    def numbers(self, out: str) -> dict[str, Any]:
        """Writes the numbers of the runs that can be looked up here."""
        found = {str(server): numbers for server, numbers in numbers_in(self.store).items()}
        np.savez(out, **found)  # type: ignore[arg-type] # numpy's stub takes them for its own options
        return self.store.status()

    def fill(self, tokens: int, run: int, servers: int) -> dict[str, Any]:
        """Adds synthetic text in the names of several servers."""
        from benchmarks.store_fill import fill

        fill(
            self._config["url"], self._vocabulary, tokens, run, servers, self._config.get("tenant", "default")
        )
        return {}

    def snapshot(self) -> dict[str, Any]:
        """Writes a snapshot."""
        info = self.store.snapshot()
        return {"tokens": info.tokens, "nbytes": info.nbytes}


def _learned(run: TokenArray) -> list[NodeLogits]:
    """Predictions at two positions of a run, seen twice each, so that their rows are sent."""
    contexts = np.array([run[:CONTEXT], run[1 : CONTEXT + 1]] * 2, np.int32)
    return [NodeLogits(contexts, contexts[:, :2].copy(), np.full((4, 2), 0.4, np.float32))]


def load_kernels(vocabulary: int) -> None:
    """Loads the kernels of lookups and sorting, so that no measurement waits for them."""
    text = SyntheticText(vocabulary).tokens(4000, seed=1)
    segment = Segment.build([text], vocabulary)
    segment.count(text[:3])
    session = SegmentSession(lambda: (segment,), text[:32], "shared", "shared")
    session.observe(text[32:34])
    session.propose(60)


def main() -> None:
    """Reads commands until stdin ends."""
    worker = _Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(msgspec.json.encode(answer).decode(), flush=True)
    if worker._store is not None:
        worker.store.close()


if __name__ == "__main__":
    main()
