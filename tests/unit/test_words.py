"""Plain English in docstrings, comments and names: a noun or a verb first, and the terms of the field."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
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
    r"(?<!Zipf's )laws?": "distribution",
    r"(?<!in )(?<!into )(?<!its )(?<!last )places?": "index, slot, position, location",
    r"once is enough|twice does no harm": "Further calls do nothing.",
}
"""Words that are out, and what to write instead. Code is left alone: `x`, x(), x.y, names in Args."""

NAMES_OUT = {
    "place": "index, slot, position, node, location",
    "placed": "index, slot, position, node, location",
    "law": "distribution",
    "doubt": "backoff",
    "worth": "effective_order",
    "deepest": "max_depth",
    "floor": "min_prob, threshold",
    "said": "predictions, emitted, logits, ...",
    "leader": "prefix_owner",
}
"""Words that are out as a name or a part of one, in the singular or plural, and what to write instead."""

NAMES_OUT_OF_BLENDING = {"claim": "weight", "leave": "escape_prob", "once": "escape_per_order"}
"""Out where contexts are blended, in `index` and `drafting` alone: elsewhere a client may leave."""

NAMES_KEPT = {
    ("retrieval_draft/draft_service/wire.py", "deepest"): "a former field that clients still send",
    ("retrieval_draft/draft_service/wire.py", "floor"): "a former field that clients still send",
    ("retrieval_draft/draft_service/wire.py", "said"): "a former field that clients still send",
    ("retrieval_draft/bench/ties.py", "floor"): "torch.floor",
    ("retrieval_draft/index/store/snapshots.py", "SnapshotPlace"): "programs of others import it",
    ("retrieval_draft/index/store/snapshotter.py", "SnapshotPlace"): "programs of others import it",
    ("retrieval_draft/engine/logits.py", "_read_in_place"): "the idiom: nothing is copied",
}
"""Names that stay, by file, each with the reason."""

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


def names_out(source: str, out: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Line, name and replacement of each name of which a part is out."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", token.string):
                word = part.lower() if part.lower() in out else part.lower().removesuffix("s")
                if word in out:
                    yield token.start[0], token.string, out[word]


@pytest.mark.parametrize("folder", ["retrieval_draft", "benchmarks"])
def test_docstrings_and_comments_are_in_plain_english(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, message in sorted(faults(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_names_are_the_terms_of_the_field() -> None:
    found, kept = [], set()
    for path in [*(ROOT / "retrieval_draft").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        blends = name.startswith(("retrieval_draft/index/", "retrieval_draft/drafting/"))
        out = NAMES_OUT | (NAMES_OUT_OF_BLENDING if blends else {})
        for line, word, instead in names_out(path.read_text(encoding="utf-8"), out):
            if (name, word) in NAMES_KEPT:
                kept.add((name, word))
            else:
                found.append(f"{name}:{line}: {word!r}: write {instead!r}")
    assert not found, "\n".join(sorted(found))
    assert kept == set(NAMES_KEPT), "exceptions that nothing needs any more"


def test_names_that_are_out_are_found_in_parts_of_names() -> None:
    source = "class SnapshotPlace:\n    FLOOR_STEPS = _places = 1\n\nreplace = sort_laws = 'place'  # law\n"
    names = [(line, name) for line, name, _ in names_out(source, NAMES_OUT)]
    assert names == [(1, "SnapshotPlace"), (2, "FLOOR_STEPS"), (2, "_places"), (4, "sort_laws")]
    assert not list(names_out("batch.leave(claims)", NAMES_OUT))
    assert len(list(names_out("batch.leave(claims)", NAMES_OUT_OF_BLENDING))) == 2


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
