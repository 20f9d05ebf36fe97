"""A Redis of streams in this process, one call at a time, which fails where a test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import ConnectionError, NoPermissionError, ResponseError

from retrieval_draft.index.store.log_replica import FIELD, stream_id

__all__ = ["FakeRedis", "Turns"]


class FakeRedis:
    """Streams, kept as lists of (id, payload). Scripts are not permitted, as on some servers.

    Attributes:
        streams: By key, in the order of their ids.
        run_id: Changes when Redis restarts.
        milliseconds: Of the next entry's id.
        accepts: Entries of the next pipelines that are taken; the others get `refusal`. None for all.
        dies: Whether the next pipeline is carried out, and the connection breaks before the answer.
        calls: Names of calls that tests look at, with what they were given.
    """

    def __init__(self) -> None:
        self.streams: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.last: dict[bytes, bytes] = {}
        self.run_id = "first"
        self.milliseconds = 1_000_000
        self.accepts: int | None = None
        self.refusal: Exception = ResponseError("OOM command not allowed")
        self.dies = False
        self.calls: list[tuple[Any, ...]] = []

    def add(self, key: bytes, payload: bytes, at: int | None = None) -> bytes:
        """Appends an entry as another server would, or puts one in front of later ones, as a failover can."""
        self.milliseconds = self.milliseconds + 1 if at is None else at
        name = b"%d-0" % self.milliseconds
        stream = self.streams.setdefault(key, [])
        stream.append((name, payload))
        stream.sort(key=lambda entry: stream_id(entry[0]))
        self.last[key] = max(self.last.get(key, b"0-0"), name, key=stream_id)
        return name

    def payloads(self, key: bytes) -> list[bytes]:
        """All that a stream holds, in order."""
        return [payload for _, payload in self.streams.get(key, ())]

    def wipe(self) -> None:
        """Loses all streams."""
        self.streams.clear()
        self.last.clear()

    def client(self) -> FakeClient:
        """A connection."""
        return FakeClient(self)


class FakeClient:
    """The calls of redis-py that the store makes."""

    def __init__(self, redis: FakeRedis) -> None:
        self.redis = redis

    def info(self, section: str) -> dict[str, str]:
        return {"run_id": self.redis.run_id}

    def set_response_callback(self, command: str, callback: Callable[..., Any]) -> None: ...

    def eval(self, script: str, keys: int, *rest: Any) -> Any:
        self.redis.calls.append(("eval", *rest))
        raise NoPermissionError("scripts are not permitted")

    def pipeline(self, transaction: bool = True) -> FakePipeline:
        return FakePipeline(self.redis)

    def xread(self, starts: Mapping[bytes, bytes], count: int, block: int | None = None) -> Any:
        found = []
        for key, start in starts.items():
            stream = self.redis.streams.get(key, [])
            items = [[name, [FIELD, value]] for name, value in stream if stream_id(name) > stream_id(start)]
            if items:
                found.append([key, items[:count]])
        return found

    def xinfo_stream(self, key: bytes) -> list[bytes]:
        if key not in self.redis.streams:
            raise ResponseError("no such key")
        return [b"length", b"1", b"last-generated-id", self.redis.last[key]]

    def time(self) -> tuple[int, int]:
        return self.redis.milliseconds // 1000, 0

    def xtrim(self, key: bytes, **limits: Any) -> int:
        self.redis.calls.append(("xtrim", limits))
        return 0

    def memory_usage(self, key: bytes) -> int:
        self.redis.calls.append(("memory_usage",))
        return sum(map(len, self.redis.payloads(key)))

    def xlen(self, key: bytes) -> int:
        return len(self.redis.streams.get(key, ()))


class FakePipeline:
    """Additions, carried out together; each may be refused alone."""

    def __init__(self, redis: FakeRedis) -> None:
        self.redis = redis
        self.entries: list[tuple[bytes, bytes]] = []

    def xadd(self, key: bytes, fields: Mapping[bytes, bytes]) -> None:
        self.entries.append((key, fields[FIELD]))

    def execute(self, raise_on_error: bool = True) -> Sequence[Any]:
        redis, replies = self.redis, []
        for key, payload in self.entries:
            if redis.accepts is not None:
                if not redis.accepts:
                    replies.append(redis.refusal)
                    continue
                redis.accepts -= 1
            replies.append(redis.add(key, payload))
        if redis.dies:
            redis.dies = False
            raise ConnectionError("gone before the answer")
        return replies


class Turns:
    """Stands for a `ReconnectingWorker`: a test takes each turn of the thread itself.

    Attributes:
        work: The function that the thread calls with a client.
        lost: The function that it calls after a failure.
        successes: Number of times that the thread reported success.
    """

    def __init__(self) -> None:
        self.work: Callable[[Any], None]
        self.lost: Callable[[], None]
        self.successes = 0

    def run(self, work: Callable[[Any], None], lost: Callable[[], None] = lambda: None) -> None:
        self.work, self.lost = work, lost

    def worked(self) -> None:
        self.successes += 1
