"""Shared stores for tests: real servers, and copies of the log to compare."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

VOCABULARY = 5000
FINGERPRINT = "f" * 32
NONE = np.empty(0, np.int32)


def wait_until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def run(number: int, tokens: int = 40) -> TokenArray:
    return np.random.default_rng(number).integers(0, VOCABULARY, tokens).astype(np.int32)


def texts(store: SharedStore) -> Counter[tuple[int, ...]]:
    """Every run that can be looked up, and how often it is there."""
    store.mirror.publish()  # waits for one that goes on
    wait_until(lambda: not store.mirror.unsorted)
    found: Counter[tuple[int, ...]] = Counter()
    for segment in store.segments:
        joined = segment.texts(VOCABULARY).tolist()
        while joined:
            end = joined.index(VOCABULARY)
            found[tuple(joined[:end])] += 1
            joined = joined[end + 1 :]
    return found


def runs(*numbers: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(run(number).tolist()) for number in numbers)


def share(store: SharedStore, *numbers: int) -> None:
    """Hands runs over; nobody waits for Redis.

    One call may lose the processor, or the interpreter, to others; the more threads, the longer. One that
    waited would take the store's timeout each time.
    """
    seconds = []
    for number in numbers:
        begin = time.perf_counter()
        store.share(NONE, run(number))
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.75 * store.config.timeout


def drafts(store: SharedStore, prompt: TokenArray, nodes: int = 8) -> list[int]:
    session = SharedSource(store).open(prompt)
    return session.propose(nodes).tokens.tolist()


@contextmanager
def opened(url: str, count: int = 2, environ: dict[str, str] | None = None, **options: Any) -> Iterator[Any]:
    """Stores with a short timeout, closed afterwards whatever happens."""
    options.setdefault("timeout", 0.4)
    stores = [
        SharedStore(StoreConfig(url, **options), FINGERPRINT, VOCABULARY, environ or {}) for _ in range(count)
    ]
    try:
        yield stores
    finally:
        for store in stores:
            store.close(0.2)
            assert not any(thread.is_alive() for thread in store._threads)


def wait_same(stores: list[SharedStore], expected: Counter[tuple[int, ...]], seconds: float = 20.0) -> None:
    """All hold exactly what is expected."""
    wait_until(lambda: all(store.mirror.entries >= expected.total() for store in stores), seconds)
    for store in stores:
        store.mirror.publish()
        assert texts(store) == expected
    # Rows go after the texts, as entries of their own.
    wait_until(lambda: len({store.mirror.digest for store in stores}) == 1, seconds)


def alive(stores: list[SharedStore]) -> bool:
    return all(
        thread.is_alive() or "snapshots" in thread.name for store in stores for thread in store._threads
    )
