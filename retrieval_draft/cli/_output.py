"""What every command prints alike: JSON on stdout, tables, colours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

__all__ = ["paint", "print_json", "print_table", "wants_color"]

_GREEN, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def print_json(value: Any) -> None:
    """Prints one object on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def wants_color(stream: IO[str]) -> bool:
    """Whether `stream` takes colours: a terminal does, ``NO_COLOR`` and ``FORCE_COLOR`` overrule."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def paint(text: str) -> str:
    """`text` in the colour of accepted drafts; its line ends stay plain."""
    return "\n".join(f"{_GREEN}{line}{_PLAIN}" if line else line for line in text.split("\n"))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str] | None = None
) -> None:
    """Prints a table, the first column to the left and numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    file = stream or sys.stdout
    # rich takes 80 columns where there is no terminal, and would cut names short.
    Console(file=file, width=None if file.isatty() else 120).print(table)
