"""Every line of docs/security.md is held by a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text("utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions


def test_every_line_names_one_or_says_what_is_allowed() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line != "| | held by |"]
    assert len(rows) > 20
    assert [row for row in rows if "`tests/" not in row and "**can**" not in row] == []
