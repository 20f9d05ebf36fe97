"""Tokens a second, with drafts and estimated without."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from retrieval_draft.server.scheduler.events import StepReport

__all__ = ["Rates"]

KEPT_SECONDS = 90


@dataclass(slots=True)
class _Second:
    number: int
    tokens: int = 0
    busy: float = 0.0
    plain: float = 0.0
    row_steps: int = 0


class Rates:
    """Sums of the last `KEPT_SECONDS` seconds.

    A rate is tokens over the time that steps took, so that idle time does not count. The plain estimate is
    the time of the same tokens at one token a row and pass, each pass at its measured time.
    """

    def __init__(self) -> None:
        self._kept: deque[_Second] = deque(maxlen=KEPT_SECONDS)

    def add(self, now: float, report: StepReport) -> None:
        """Counts a step.

        Args:
            now: Seconds of a monotonic clock.
            report: The step.
        """
        number = int(now)
        if not self._kept or self._kept[-1].number != number:
            self._kept.append(_Second(number))
        last = self._kept[-1]
        tokens, rows = sum(len(row.tokens) for row in report.rows), len(report.rows)
        last.tokens += tokens
        last.busy += report.seconds
        last.row_steps += rows
        if rows:
            last.plain += tokens / rows * report.plain_seconds

    def summary(self, now: float, window: int = 10) -> dict[str, Any]:
        """Rates of the last `window` seconds in which there was work, and every kept second's for a curve."""
        recent = [each for each in self._kept if each.number >= int(now) - window] or list(self._kept)[
            -window:
        ]
        tokens, busy = sum(each.tokens for each in recent), sum(each.busy for each in recent)
        plain, steps = sum(each.plain for each in recent), sum(each.row_steps for each in recent)
        return {
            "tokens_per_second": tokens / busy if busy else 0.0,
            "plain_tokens_per_second": tokens / plain if plain else None,
            "tokens_per_step": tokens / steps if steps else 0.0,
            "curve": [
                [
                    each.number - int(now),
                    round(each.tokens / each.busy, 2) if each.busy else 0.0,
                    round(each.tokens / each.plain, 2) if each.plain else None,
                ]
                for each in self._kept
            ],
        }
