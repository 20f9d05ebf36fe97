"""Plain English in docstrings and comments: a noun or a verb comes first, and terms are the field's."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FIRST = ("What", "How", "Where", "Which", "Whether", "Who", "Whom", "Whose", "Why", "When", "That")
"""Words that begin a clause: no docstring begins with one. Write "True if", or a noun."""

ENTRY = ("What", "How", "Where", "Which", "Who", "Whom", "Whose", "Why")
"""Words with which no entry of Args, Attributes and the like begins; "Whether" is a boolean there."""

OUT = {
    r"behind": "after",
    r"sa(?:id|ys?)": "predicts, outputs, returns, names",
    r"(?:how[ -])?manieth": "index",
    r"hand(?:s|ed|ing)? (?:back|in|on|out|over|round)": "passes, adds, returns",
    r"let(?:s|ting)? go": "frees, releases",
    r"(?:no|some|any|every)body|who(?:m)?ever": "the caller, another thread, ...",
    r"tak(?:es?|en|ing) in(?! turn)": "appends, adds",
    r"tak(?:es?|en|ing) note": "records",
    r"giv(?:es?|en|ing) up": "aborts",
    r"(?:go|goes|gone|going|went) on": "continues",
    r"whatever": "for any",
    r"lest": "so that ... not",
    r"held to": "checked against",
    r"(?<!Zipf's )law": "distribution",
    r"once is enough|twice does no harm": "Further calls do nothing.",
}
"""Words that are out, and what to write instead. Code is left alone: `x`, x(), x.y, names in Args."""

_CODE = re.compile(r"``[^`]*``|`[^`]*`|^\s+\*{0,2}\w+(?:, \w+)*:(?= )")


def words_out(text: str) -> Iterator[tuple[str, str]]:
    """Words of a line that are out, each with its replacement."""
    prose = _CODE.sub("", text)
    for pattern, instead in OUT.items():
        for found in re.finditer(rf"(?<![\w./-])(?:{pattern})(?![\w(=-])", prose, re.IGNORECASE):
            yield found.group(), instead


def first_words_out(docstring: str) -> Iterator[tuple[int, str]]:
    """Line within a docstring and the word, where the docstring or an entry begins with a clause."""
    for number, line in enumerate(docstring.split("\n")):
        if begin := re.match(rf"\s*({'|'.join(FIRST)}) ", line):
            yield number, begin.group(1)
        entry = re.match(
            rf"\s+\*{{0,2}}\w+(?:, \w+)*: (?:\w+, shape \([^)]*\)\. )?({'|'.join(ENTRY)})\b", line
        )
        if entry:
            yield number, entry.group(1)


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and message of each fault in the docstrings (of attributes too) and comments of a module."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            for number, word in first_words_out(node.value.value):
                yield node.lineno + number, f"begins with {word!r}: begin with a noun or a verb"
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                for word, instead in words_out(lines[line - 1]):
                    yield line, f"{word!r}: write {instead!r}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            for word, instead in words_out(token.string):
                yield token.start[0], f"{word!r}: write {instead!r}"


@pytest.mark.parametrize("folder", ["retrieval_draft", "benchmarks"])
def test_docstrings_and_comments_are_in_plain_english(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, message in sorted(faults(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_docstrings_of_tests_begin_with_no_clause_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno + number}: begins with {word!r}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number, word in first_words_out(node.value.value)
    ]
    assert not found, "\n".join(found)


def test_faults_are_found_with_their_lines() -> None:
    source = '''"""What a row is."""

LIMIT = 3
"""Tokens behind the root."""


def draft(said: int) -> int:
    """Returns `said`, whose law is known.

    Args:
        said: int32, shape (n,). How many.
    """
    return said  # nobody is told
'''
    assert [line for line, _ in sorted(faults(source))] == [1, 4, 8, 11, 13]


def test_code_and_other_words_pass() -> None:
    source = '''"""Rows in turn: `behind(2)`, nothing of `said`, a look-behind, Zipf's law."""

def behind(said: int) -> int:
    """True if behind(1) has a value.

    Args:
        said: Whether rows are taken in turn.
    """
'''
    assert not list(faults(source))
