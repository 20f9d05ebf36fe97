"""Tests of the state of the connection and what is logged of it."""

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    TimeoutError,
)

from retrieval_draft.index.store.health import Health


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ConnectionError("refused"), "unreachable"),
        (TimeoutError("slow"), "unreachable"),
        (BusyLoadingError("loading"), "unreachable"),
        (OSError("no file"), "unreachable"),
        (OutOfMemoryError("OOM"), "refusing"),
        (ReadOnlyError("READONLY"), "refusing"),
        (AuthenticationError("WRONGPASS"), "denied"),
        (NoPermissionError("NOPERM"), "denied"),
    ],
)
def test_what_an_error_means(error, state) -> None:
    health = Health("redis://there")
    health.failed("sending", error)
    assert (health.state, health.reason) == (state, str(error))


def test_one_line_for_each_change_of_state(logged) -> None:
    health = Health("redis://there")
    health.worked("sending")
    assert health.state == "connecting"
    for _ in range(3):
        health.worked("receiving")
        health.worked("sending")
    for _ in range(3):
        health.failed("receiving", ConnectionError("gone"))
        health.failed("sending", ConnectionError("gone"))
    health.worked("receiving")  # half of it is no recovery
    for _ in range(3):
        health.failed("sending", OutOfMemoryError("OOM"))
    health.worked("sending")
    lines = [record.getMessage() for record in logged.records]
    assert [line.split(" ", 3)[3].split(":")[0] for line in lines] == [
        "is connected.",
        "cannot be reached",
        "refuses what is sent",
        "is connected.",
    ]
    assert [record.levelname for record in logged.records] == ["INFO", "WARNING", "WARNING", "INFO"]
    assert health.changes == 4
    health.close()
    health.failed("sending", ConnectionError("gone"))
    assert (len(logged.records), health.state) == (4, "closed")
