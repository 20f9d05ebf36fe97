"""Counters of a batch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ChainCounts"]


@dataclass(slots=True)
class ChainCounts:
    """Counters of a batch since it was made.

    Attributes:
        requests: Sessions opened.
        steps: Calls of `step`.
        rows: Rows of all steps.
        tokens: Emitted tokens appended.
        drafted: Tokens of chains whose outcome was seen.
        accepted: Those of them that were emitted.
    """

    requests: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
