"""Output of all commands: JSON on stdout, tables, colours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

__all__ = ["paint", "print_json", "print_table", "wants_color"]

_WIDEST = 1 << 20

_GREEN, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def print_json(value: Any) -> None:
    """Prints one object on stdout, characters that its encoding lacks as JSON escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def wants_color(stream: IO[str]) -> bool:
    """True if `stream` is a terminal, unless ``NO_COLOR`` or ``FORCE_COLOR`` overrules that."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def paint(text: str) -> str:
    """`text` in the colour of accepted drafts; its line ends stay plain."""
    return "\n".join(f"{_GREEN}{line}{_PLAIN}" if line else line for line in text.split("\n"))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str] | None = None
) -> None:
    """Prints a table, the first column to the left and numbers to the right. No cell is cut.

    On a terminal that is narrower than the table each row becomes lines of a heading and a value.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    file = stream or sys.stdout
    console = Console(file=file)
    # rich cuts tables that are wider than the terminal, or than 80 columns without one.
    width = max(console.measure(table, options=console.options.update(width=_WIDEST)).maximum, len(title))
    if file.isatty() and width > console.width:
        print("\n".join(_stacked(title, columns, rows)), file=file)
        return
    console.width = width
    console.print(table)


def _stacked(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table's rows one below the other, a heading and a value to a line."""
    if title:
        yield title
    for row in rows:
        for number, (name, value) in enumerate(zip(columns, row, strict=True)):
            yield f"{'  ' if number else ''}{name}: {value}".replace(": ", " ", not name)
