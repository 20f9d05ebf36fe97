"""The pages that users read, and the blocks of code on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
FENCE = re.compile(r"^( *)```(.*)$")
COMMENT = re.compile(r"<!-- (not run|run by|prints):? ?(.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its path, from the root of the repository.
        line: Number of its first line.
        language: Behind the fence.
        text: Without the fence and its indentation.
        kind: The comment above it: "not run", "run by", "prints", or "".
        remark: The rest of the comment.
    """

    page: str
    line: int
    language: str
    text: str
    kind: str
    remark: str


@cache
def lines_of(page: str) -> list[str]:
    return (ROOT / page).read_text("utf-8").splitlines()


@cache
def blocks_of(page: str) -> list[Block]:
    found: list[Block] = []
    lines = lines_of(page)
    start = None
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if start is None:
            start, indent, language = number, len(fence[1]), fence[2]
            above = COMMENT.search(lines[number - 2]) if number > 1 else None
            continue
        text = "".join(f"{each[indent:]}\n" for each in lines[start : number - 1])
        kind, remark = (above[1], above[2].strip()) if above else ("", "")
        found.append(Block(page, start + 1, language, text, kind, remark))
        start = None
    assert start is None, f"{page}: the block of line {start} has no end"
    return found


@cache
def prose_of(page: str) -> str:
    """The page without its blocks."""
    out, inside = [], False
    for line in lines_of(page):
        if FENCE.match(line):
            inside = not inside
            continue
        out.append("" if inside else line)
    return "\n".join(out)
