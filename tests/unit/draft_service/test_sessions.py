from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrieval_draft.draft_service.errors import ServiceFullError, TooLargeError, UnknownSessionError
from retrieval_draft.draft_service.limits import SessionLimits
from retrieval_draft.draft_service.sessions import OpenSession, SessionTable
from retrieval_draft.errors import InvalidInputError

TAIL = np.array([1], np.int32)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def table(**limits: Any) -> tuple[SessionTable, Clock]:
    clock = Clock()
    return SessionTable(SessionLimits(**limits), clock), clock


def opened(sessions: SessionTable, tokens: int = 3, tenant: str = "default") -> OpenSession:
    sessions.reserve(tokens)
    nothing: Any = None
    return sessions.add(tenant, nothing, TAIL, tokens)


def test_only_so_many_sessions_are_open() -> None:
    sessions, _ = table(max_sessions=2)
    first = opened(sessions)
    sessions.reserve(1)  # one that is being opened counts
    with pytest.raises(ServiceFullError, match="2 sessions"):
        sessions.reserve(1)
    sessions.give_back(1)
    sessions.remove(first)
    opened(sessions)
    opened(sessions)
    assert len(sessions) == 2


def test_only_so_many_tokens_are_held() -> None:
    sessions, _ = table(max_tokens=10, max_session_tokens=8)
    first = opened(sessions, 6)
    with pytest.raises(TooLargeError, match="9 tokens"):
        sessions.reserve(9)
    with pytest.raises(ServiceFullError, match="6 tokens, and 5 more"):
        sessions.reserve(5)
    sessions.grow(first, 2)
    with pytest.raises(TooLargeError, match="would have 9"):
        sessions.grow(first, 1)
    second = opened(sessions, 2)
    with pytest.raises(ServiceFullError):
        sessions.grow(second, 1)
    assert sessions.tokens == 10
    sessions.shrink(first, 2)
    sessions.remove(first)
    sessions.remove(first)
    sessions.remove(second)
    sessions.shrink(second, 2)  # it is gone with all that it held
    assert (len(sessions), sessions.tokens) == (0, 0)
    with pytest.raises(UnknownSessionError):
        sessions.grow(first, 1)


def test_what_nobody_uses_expires_and_what_is_used_does_not() -> None:
    sessions, clock = table(idle_seconds=10.0)
    old, used = opened(sessions), opened(sessions)
    clock.now += 6
    assert sessions.get("default", used.key) is used
    clock.now += 6
    assert sessions.expired() == [old]
    assert sessions.expired() == []
    with pytest.raises(UnknownSessionError, match=old.key):
        sessions.get("default", old.key)
    assert (len(sessions), sessions.tokens) == (1, 3)


def test_a_tenant_does_not_see_the_sessions_of_another() -> None:
    sessions, _ = table()
    mine = opened(sessions, tenant="a")
    assert sessions.get("a", mine.key) is mine
    with pytest.raises(UnknownSessionError):
        sessions.get("b", mine.key)
    assert (sessions.count("a"), sessions.count("b")) == (1, 0)
    sessions.remove(mine)
    assert sessions.count("a") == 0


@pytest.mark.parametrize("name", ["max_sessions", "max_tokens", "max_session_tokens", "idle_seconds"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        SessionLimits(**{name: 0})
