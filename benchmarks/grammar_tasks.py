"""Requests for replies of eight shapes, with their grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retrieval_draft import Grammar

__all__ = ["SUBJECTS", "TASKS", "GrammarTask"]

_CALL = ('<tool_call>\n{"name": "search_flights", "arguments": ', "}\n</tool_call>")
_PATTERN = r"[A-Z]{2}-\d{4} [a-z]{3,8}"


@dataclass(frozen=True, slots=True)
class GrammarTask:
    """Shape of replies.

    Attributes:
        request: To the model, in which ``{}`` stands for a subject.
        grammar: Of the reply.
        follows: True if a finished reply is valid, found without the grammar.
        kind: "json", "call" or "text".
    """

    request: str
    grammar: Grammar
    follows: Callable[[str], bool]
    kind: str = "json"


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _json(request: str, schema: dict[str, Any]) -> GrammarTask:
    return GrammarTask(request, Grammar.json_schema(schema), lambda text: _is_valid(schema, text))


def _call(request: str, schema: dict[str, Any]) -> GrammarTask:
    before, after = _CALL

    def follows(text: str) -> bool:
        inner = text.removeprefix(before).removesuffix(after)
        return text == before + inner + after and _is_valid(schema, inner)

    return GrammarTask(request, Grammar.json_schema(schema).within(before, after), follows, "call")


def _is_valid(schema: dict[str, Any], text: str) -> bool:
    import jsonschema_rs

    try:
        return bool(jsonschema_rs.is_valid(schema, json.loads(text)))
    except ValueError:
        return False


_TEXT, _COUNT = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 9999}
_PERSON = _object(name=_TEXT, age=_COUNT, email=_TEXT)
_DEEP = _object(city=_TEXT, visitors=_COUNT)
for _key in ("district", "region", "country", "continent"):
    _DEEP = _object(**{_key: _DEEP})

TASKS: dict[str, GrammarTask] = {
    "nested": _json(
        "An order of three books and a pen by somebody in {}.",
        _object(customer=_PERSON, items={"type": "array", "minItems": 2, "maxItems": 3,
                                         "items": _object(product=_TEXT, quantity=_COUNT)}),
    ),
    "enum": _json(
        "The weather in {}.",
        _object(city=_TEXT, temperature=_COUNT, sky={"enum": ["clear", "cloudy", "rainy"]},
                wind={"enum": ["none", "breeze", "storm"]}),
    ),
    "union": _json(
        "The population of {}, or an error if it is unknown.",
        {"anyOf": [_object(found={"const": True}, population=_COUNT),
                   _object(found={"const": False}, error=_TEXT)]},
    ),
    "arrays": _json(
        "Three sights of {}, with marks from 0 to 10.",
        {"type": "array", "minItems": 3, "maxItems": 3, "items": _object(sight=_TEXT, mark=_COUNT)},
    ),
    "regex": GrammarTask(
        "A reference such as AB-1234 abc for {}.",
        Grammar.regex(_PATTERN),
        lambda text: re.fullmatch(_PATTERN, text) is not None,
        "text",
    ),
    "unicode": _json(
        "Size and name of {}.",
        _object(größe=_COUNT, 名前=_TEXT, land={"enum": ["Österreich", "日本", "España"]}),
    ),
    "deep": _json("{} on a map.", _DEEP),
    "call": _call(
        "Search flights from Madrid to {}.",
        _object(origin=_TEXT, destination=_TEXT, passengers=_COUNT,
                cabin={"enum": ["economy", "business"]}, flexible_dates={"type": "boolean"}),
    ),
}  # fmt: skip
"""Shapes by name."""

SUBJECTS = (
    "Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito", "Accra", "Berlin", "Vienna",
    "Prague", "Athens", "Dublin", "Lisbon", "Warsaw", "Zagreb", "Nairobi", "Havana", "Bogotá", "Hanoi",
    "Seoul", "Perth", "Boston", "Denver",
)  # fmt: skip
"""Of the requests of one shape."""
