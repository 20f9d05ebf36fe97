"""Phrases in files: JSON, JSON lines, or text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["read_phrases"]


def read_phrases(path: Path) -> list[str]:
    """Reads phrases from a file.

    Args:
        path: ``.json``, a list of strings, or ``.jsonl``, one on each line, where an object with ``text`` may
            replace a string. Any other file is text: lines of nothing but three or more dashes separate the
            phrases, whose line breaks at both ends are left out; without such a line every line is one. Blank
            phrases are skipped.

    Raises:
        InvalidInputError: The file cannot be read, is not UTF-8, not of that form, or holds no phrase.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"The phrases file {path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.",
            "Save it as UTF-8.",
        ) from error
    except OSError as error:
        raise InvalidInputError(f"Cannot read the phrases file {path}: {error.strerror}.") from error
    form = {".json": _json_phrases, ".jsonl": _jsonl_phrases}.get(path.suffix.lower(), _text_phrases)
    phrases = [phrase for phrase in form(text, path) if phrase.strip()]
    if not phrases:
        raise InvalidInputError(
            f"The phrases file {path} holds no phrase; it must hold at least one.",
            "In a text file every line is a phrase, or lines of --- separate longer ones.",
        )
    return phrases


def _text_phrases(text: str, path: Path) -> list[str]:
    parts = re.split(r"^-{3,}[ \t]*$", text, flags=re.MULTILINE)
    return text.split("\n") if len(parts) == 1 else [part.strip("\n") for part in parts]


def _json_phrases(text: str, path: Path) -> list[str]:
    records = _parsed(text, f"The phrases file {path}")
    if not isinstance(records, list):
        raise InvalidInputError(f"The phrases file {path} is {_kind(records)}; it must be a list of strings.")
    return [_text(record, f"Entry {n} of the phrases file {path}") for n, record in enumerate(records, 1)]


def _jsonl_phrases(text: str, path: Path) -> list[str]:
    lines = [(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_text(_parsed(line, where), where) for line, where in lines]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} must hold strings as JSON: {error}.") from error


def _text(record: Any, where: str) -> str:
    phrase = record.get("text") if isinstance(record, dict) else record
    if not isinstance(phrase, str):
        raise InvalidInputError(f'{where} is {_kind(record)}; it must be a string, or an object with "text".')
    return phrase


def _kind(value: Any) -> str:
    """Name of a JSON value's type."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:5])) or 'no keys'}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"the value {json.dumps(value)[:40]}"
