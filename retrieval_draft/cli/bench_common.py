"""Shared parts of the bench commands."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Beside", "ratio_range"]

Beside = Annotated[int, typer.Option(min=0, help="Busy processes beside the measurement.")]


def ratio_range(ratio: dict[str, float] | None) -> str:
    """A median with its tenths; empty where there is none."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
