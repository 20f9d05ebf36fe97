"""What a batch did so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ChainCounts"]


@dataclass(slots=True)
class ChainCounts:
    """What a batch did so far.

    Attributes:
        requests: Sessions opened.
        steps: Calls of `step`.
        rows: Rows of all steps.
        tokens: Emitted tokens taken in.
        drafted: Tokens of chains whose outcome was seen.
        accepted: Of these, how many were emitted.
    """

    requests: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
