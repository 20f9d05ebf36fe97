"""Limits of the drafting service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from retrieval_draft._settings import Range, check_ranges

__all__ = ["SessionLimits"]


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Limits on open sessions.

    Attributes:
        max_sessions: Open sessions at once, of all tenants.
        max_tokens: Tokens of all open sessions: prompts, references and replies.
        max_session_tokens: Tokens of one session.
        idle_seconds: A session that is not used for so long is closed.
    """

    max_sessions: Annotated[int, Range(1, 1 << 30)] = 4096
    max_tokens: Annotated[int, Range(1, 1 << 50)] = 1 << 25
    max_session_tokens: Annotated[int, Range(1, 1 << 50)] = 1 << 20
    idle_seconds: Annotated[float, Range(0.01, 1 << 30)] = 600.0

    def __post_init__(self) -> None:
        check_ranges(self)
