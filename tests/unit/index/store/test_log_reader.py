"""Reading streams where scripts are not permitted."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ConnectionError, NoPermissionError, ResponseError

from retrieval_draft.index.store.log_reader import FEW, LogReader
from tests.support.fake_redis import FakeRedis


def reader(redis: FakeRedis) -> LogReader:
    return LogReader(redis.client(), 1000)


def test_the_last_id_is_known_before_anything_was_read() -> None:
    redis = FakeRedis()
    assert reader(redis).last_id(b"log") == b"0-0", "of a stream that is not there"
    name = redis.add(b"log", b"entry")
    assert reader(redis).last_id(b"log") == name


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (NoPermissionError("no"), None),
        (ResponseError("WRONGTYPE Operation against a key"), None),
        (ResponseError("ERR no such key"), b"0-0"),
    ],
)
def test_where_the_last_id_cannot_be_asked_for_it_is_not_known(
    error: Exception, found: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = reader(FakeRedis())

    def fail(key: bytes) -> Any:
        raise error

    monkeypatch.setattr(made._client, "xinfo_stream", fail)
    assert made.last_id(b"log") == found


def test_a_connection_that_breaks_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = reader(FakeRedis())

    def fail(*given: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(made._client, "eval", fail)
    with pytest.raises(ConnectionError):
        made.last_id(b"log")


def test_a_few_entries_are_read_at_a_time_and_there_may_be_more() -> None:
    redis = FakeRedis()
    names = [redis.add(b"log", b"entry") for _ in range(FEW + 1)]
    made = reader(redis)
    ((key, items),), more = made.read({b"log": b"0-0", b"other": b"0-0"})
    assert (key, [name for name, _ in items], more) == (b"log", names[:FEW], True)
    ((_, items),), more = made.read({b"log": names[FEW - 1]})
    assert ([name for name, _ in items], more) == (names[FEW:], False)
    assert made.read({b"log": names[-1]}) == ([], False)
