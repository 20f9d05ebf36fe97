"""Soak test of many servers and entries with random kills: counts of lost, doubled and different entries."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.store_worker import NUMBERED_TOKENS, WorkerProcess
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft._progress import progress
from retrieval_draft.errors import DatastoreError

__all__ = ["measure_soak"]

_VOCABULARY = 32000
_WAIT_SECONDS = 900.0
_STILL_SECONDS = 30.0
"""Seconds without a change after which the servers' entries are final, equal or not."""


class _Server:
    """One server, and those that were killed in its place."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self.shares: dict[int, int] = {}
        self.left = 0
        self.worker: WorkerProcess | None = None

    def start(self, number: int, count: int) -> None:
        """Starts a process that shares `count` runs, numbered from 0."""
        self.number, self.left = number, count
        self.worker = WorkerProcess(**self._config)
        self.worker.ask(do="add", server=number, first=0, count=count, progress=str(self._progress(number)))

    def kill(self) -> int:
        """Kills it.

        Returns:
            Runs that were not accepted.
        """
        assert self.worker is not None
        self.worker.kill()
        self.shares[self.number] = self.accepted
        return self.left - self.accepted

    @property
    def accepted(self) -> int:
        """Runs of the current process that Redis has accepted; may lag, never leads."""
        with suppress(OSError):
            return int.from_bytes(self._progress(self.number).read_bytes(), "little")
        return 0

    def _progress(self, number: int) -> Path:
        return self._folder / f"accepted-{number}"


def measure_soak(
    folder: Path, *, servers: int = 10, entries: int = 1_000_000, kills: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Servers share numbered runs while servers and Redis are killed at random moments.

    A killed server is replaced by a new one, empty but for the snapshot, which shares the runs of the old one
    that were not accepted. In the end every server must hold every accepted run once.

    Args:
        folder: For the store's data and snapshots.
        servers: Processes.
        entries: Runs of 12 tokens to be accepted in all, at least.
        kills: Of servers, and half as many of Redis, spread over the run.
        seed: Of the kills.

    Returns:
        Entries accepted, the number of them that the worst server lacks (`lost`), the number that the worst
        has more than once (`doubled`), whether all servers hold the same (`agree`), and counts.
    """
    random_kills = random.Random(seed)
    events = ["server"] * kills + ["redis"] * (kills // 2)
    random_kills.shuffle(events)
    with ValkeyProcess(folder / "soak") as redis:
        config = {
            "url": redis.url, "vocabulary": _VOCABULARY, "snapshots": str(folder / "soak-snapshots"),
            "snapshot_seconds": 20.0, "queue_tokens": 1 << 24,
        }  # fmt: skip
        group = [_Server(folder, config) for _ in range(servers)]
        try:
            for number, server in enumerate(group):
                server.start(number, -(-entries // servers))
            done = _run(group, redis, entries, events, random_kills)
            happened = {
                "redis_kills": kills // 2 - events.count("redis"),
                "server_kills": kills - events.count("server"),
            }
            return _judge(group, folder, done) | happened
        finally:
            for server in group:
                if server.worker is not None:
                    server.worker.kill()


def _run(
    group: list[_Server], redis: ValkeyProcess, entries: int, events: list[str], chance: random.Random
) -> int:
    """Runs until all entries are accepted; kills are spread evenly over the accepted entries, with jitter."""
    fractions = sorted(chance.uniform(0.02, 0.95) for _ in events)
    numbers = len(group)
    end = time.monotonic() + _WAIT_SECONDS
    for server in group:
        assert server.worker is not None
        server.worker.answer()
    with progress("Sharing (entries)", entries, delay=0.0) as advance:
        shown = 0
        while time.monotonic() < end:
            before = sum(sum(server.shares.values()) for server in group)
            done = before + sum(server.accepted for server in group)
            advance(done - shown)
            shown = done
            while events and done >= fractions[0] * entries:
                fractions.pop(0)
                if events.pop() == "redis":
                    redis.kill()
                    time.sleep(chance.uniform(0, 1))
                    redis.start()
                else:
                    server = chance.choice(group)
                    left = server.kill()
                    server.start(numbers, left)
                    numbers += 1
                    assert server.worker is not None
                    server.worker.answer()
            if all(server.accepted >= server.left for server in group):
                return sum(sum(server.shares.values()) + server.accepted for server in group)
            time.sleep(0.02)
    raise DatastoreError(f"{shown} of {entries} entries were accepted in {_WAIT_SECONDS:.0f} s.")


def _judge(group: list[_Server], folder: Path, done: int) -> dict[str, Any]:
    """Compares the servers' entries with the accepted ones, once no more entries arrive."""
    accepted: dict[int, int] = {}
    for server in group:
        accepted |= server.shares | {server.number: server.accepted}
    workers = [server.worker for server in group if server.worker is not None]
    _settle(workers)
    held, statuses = [], []
    for number, worker in enumerate(workers):
        out = folder / f"numbers-{number}.npz"
        statuses.append(worker.call(do="numbers", out=str(out)))
        with np.load(out) as file:
            held.append({int(name): file[name] for name in file.files})
    lost = max(_lost(each, accepted) for each in held)
    doubled = max(sum(len(runs) - len(np.unique(runs)) for runs in each.values()) for each in held)
    first = held[0]
    agree = all(
        each.keys() == first.keys() and all(np.array_equal(each[name], first[name]) for name in first)
        for each in held
    )
    return {
        "entries": done,
        "lost": lost,
        "doubled": doubled,
        "learned_entries": min(status["learned_entries"] for status in statuses),
        "agree": agree and len({status["digest"] for status in statuses}) == 1,
        "tokens": NUMBERED_TOKENS * done,
        "servers": len(workers),
        "writers": len(accepted),
        "resent": sum(status["resent"] for status in statuses),
        "duplicates": sum(status["duplicates"] for status in statuses),
        "rereads": sum(status["rereads"] for status in statuses),
        "snapshots": sum(status["snapshots"] for status in statuses),
        "unsent_dropped": sum(status["unsent_dropped"] for status in statuses),
        "states": sorted({status["state"] for status in statuses}),
    }


def _settle(workers: list[WorkerProcess]) -> None:
    """Waits until all have the same number of entries, or none adds any."""
    last: list[int] = []
    since = time.monotonic()
    while time.monotonic() < since + _STILL_SECONDS:
        statuses = [worker.call(do="status") for worker in workers]
        found = [status["entries"] + status["learned_entries"] for status in statuses]
        if found != last:
            since = time.monotonic()
        elif len(set(found)) == 1:
            return
        last = found
        time.sleep(1.0)


def _lost(held: dict[int, NDArray[np.int64]], accepted: dict[int, int]) -> int:
    """Number of accepted runs that are missing."""
    return sum(
        count - len(np.intersect1d(held.get(server, np.empty(0, np.int64)), np.arange(count)))
        for server, count in accepted.items()
    )
