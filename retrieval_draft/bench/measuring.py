"""Turns of what a measurement compares, and summaries of what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = ["percentiles", "ratio_summary", "rotated"]

T = TypeVar("T")


def rotated(compared: Sequence[T], number: int) -> list[T]:
    """All of `compared`, begun with another one in each round, so that none always runs first."""
    first = number % len(compared)
    return [*compared[first:], *compared[:first]]


def percentiles(values: Any, *which: float, mean: bool = False) -> dict[str, float]:
    """Percentiles by names such as "p99"; 0 is "least" and 100 "max". With their mean on request.

    Args:
        values: Numbers, at least one.
        which: 50 and 99 by default.
        mean: Whether "mean" is among them.
    """
    names: dict[float, str] = {0: "least", 100: "max"}
    found = {names.get(each, f"p{each:g}"): float(np.percentile(values, each)) for each in which or (50, 99)}
    return found | ({"mean": float(np.mean(values))} if mean else {})


def ratio_summary(ratios: Any) -> dict[str, float] | None:
    """Median and tenths of ratios; None without any."""
    if not len(ratios):
        return None
    low, middle, high = np.percentile(ratios, [10, 50, 90]).tolist()
    return {"median": middle, "p10": low, "p90": high}
