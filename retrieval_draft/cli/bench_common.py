"""Shared parts of the bench commands."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.errors import InvalidInputError

__all__ = ["Beside", "Out", "finish", "ratio_range", "split"]

Out = Annotated[
    Path | None, typer.Option(help="Write the JSON object to a file as well.", show_default=False)
]

Beside = Annotated[int, typer.Option(min=0, help="Busy processes beside the measurement.")]


def ratio_range(ratio: dict[str, float] | None) -> str:
    """A median with its tenths; empty where there is none."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['p10']:.2f}..{ratio['p90']:.2f})"


def split(words: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Writes a result to the user's file, if there is one."""
    if out is None:
        return
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise InvalidInputError(f"Cannot write {out}: {error}.") from error
