"""A grammar as a user describes it: JSON of a schema, a regular expression, a choice of texts, or rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["ANY_WHITESPACE", "Grammar", "import_llguidance"]

_MOST = {"json_schema": 1 << 18, "regex": 1 << 14, "choice": 1 << 17, "lark": 1 << 15, "tools": 1 << 18}
"""Characters of a grammar's source by its kind: the slowest ones then compile within seconds."""

_MAX_CHOICES = 4096

ANY_WHITESPACE = r"[ \n\t]{1,64}"
"""Whitespace between the parts of JSON as a model may choose it: not without end, as small models would."""


@dataclass(frozen=True, slots=True)
class Grammar:
    r"""A rule that the whole reply follows: the model chooses among the tokens that the rule allows.

    Make one with `json_schema`, `json_object`, `regex`, `choice` or `rules`, and pass it to
    `RetrievalDrafter.generate` as ``grammar``. It is the source alone, which is compiled for a tokenizer when
    it is used first, and kept compiled.

    Attributes:
        kind: "json_schema", "regex", "choice", "lark", or "tools": a server's own rules.
        source: Of that kind, as text.
        before: Text in front of it.
        after: Text after it.
        other: The grammar that rules of the kind "tools" name ``@other``, if they do.

    Example:
        grammar = Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    """

    kind: str
    source: str
    before: str = ""
    after: str = ""
    other: Grammar | None = None

    def __post_init__(self) -> None:
        size = len(self.source) + len(self.before) + len(self.after)
        if size > _MOST[self.kind]:
            raise InvalidInputError(f"The grammar has {size} characters; {_MOST[self.kind]} are allowed.")

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | bool | str, *, whitespace: str | None = None, strict: bool = True
    ) -> Grammar:
        """JSON that validates against a schema.

        Args:
            schema: The schema, or its JSON text.
            whitespace: A regular expression of whitespace between the parts, which the model then chooses,
                such as `ANY_WHITESPACE`; None for one line with a space after commas and colons, which leaves
                nothing to choose.
            strict: Whether keywords that cannot be followed are refused; else they are ignored.

        Raises:
            InvalidInputError: It is no schema. What it asks for is checked when it is compiled.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
            given = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidInputError(f"The schema is no JSON: {error}.") from error
        if given is True:
            given = {}
        if not isinstance(given, dict):
            raise InvalidInputError(f"The schema is {text[:40]}; it must be an object.")
        options: dict[str, Any] = {"lenient": not strict, "coerce_one_of": not strict}
        if whitespace is None:
            options |= {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        else:
            options |= {"whitespace_flexible": True, "whitespace_pattern": whitespace}
        given["x-guidance"] = options  # in place of any that the schema has
        return cls("json_schema", json.dumps(given, ensure_ascii=False))

    @classmethod
    def json_object(cls, *, whitespace: str | None = None) -> Grammar:
        """Any JSON object; `whitespace` is that of `json_schema`."""
        return cls.json_schema({"type": "object"}, whitespace=whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole, in Rust's syntax: no look-around."""
        return cls("regex", _text(pattern, "A regular expression"))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of several texts.

        Raises:
            InvalidInputError: There are none, or more than 4096, or one is no text.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InvalidInputError(f"A choice is a {type(texts).__name__}; it must be a list of texts.")
        if not 1 <= len(texts) <= _MAX_CHOICES:
            raise InvalidInputError(f"A choice has {len(texts)} texts; 1 to {_MAX_CHOICES} are allowed.")
        options = [_literal(_text(text, "A choice")) for text in texts]
        words = [option for option in options if option != '""']
        # One word of the grammar, however many texts: as rules, some hundred of them would be too many.
        start = ["CHOICE"] * bool(words) + ['""'] * (len(words) < len(options))
        source = f"start: {' | '.join(start)}" + (f"\nCHOICE: {' | '.join(words)}" if words else "")
        return cls("choice", source)

    @classmethod
    def rules(cls, text: str) -> Grammar:
        """Rules in the Lark syntax of llguidance, or in GBNF (``root ::= ...``), which is translated.

        Raises:
            InvalidInputError: GBNF that cannot be translated.
        """
        text = _text(text, "A grammar")
        if "::=" in text:
            import_llguidance()
            from llguidance.gbnf_to_lark import any_to_lark

            try:
                text = any_to_lark(text)
            except Exception as error:  # its translator raises many types
                raise InvalidInputError(f"The grammar is no GBNF: {_first_line(str(error))}.") from error
        return cls("lark", text)

    def within(self, before: str, after: str) -> Grammar:
        r"""This grammar between two texts, such as ``"<tool_call>\n"`` and ``"\n</tool_call>"``.

        Names of the tokenizer's special tokens in them stand for these tokens.
        """
        return replace(self, before=before + self.before, after=self.after + after)

    def compiled_from(self, special: Callable[[str], Sequence[str | int]]) -> str:
        """The source of all of it, as llguidance reads it.

        Args:
            special: Splits a text into texts and ids of special tokens.
        """
        if self.other is not None:
            first, *more = json.loads(self.other.compiled_from(special))["grammars"]
            rules = {"name": "rules", "lark_grammar": self.source}
            return json.dumps({"grammars": [rules, first | {"name": "other"}, *more]})
        body: dict[str, Any] = {"name": "body"}
        if self.kind == "json_schema":
            body["json_schema"] = json.loads(self.source)
        elif self.kind == "regex":
            body |= json.loads(import_llguidance().LLMatcher.grammar_from_regex(self.source))["grammars"][0]
            body["name"] = "body"
        else:
            body["lark_grammar"] = self.source
        if not self.before and not self.after:
            return json.dumps({"grammars": [body]})
        around = [
            " ".join(_literal(part) if isinstance(part, str) else f"<[{part}]>" for part in special(text))
            for text in (self.before, self.after)
        ]
        main = {"name": "main", "lark_grammar": f"start: {around[0]} @body {around[1]}"}
        return json.dumps({"grammars": [main, body]})


def import_llguidance() -> Any:
    """The package that follows grammars.

    Raises:
        InvalidInputError: It is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise InvalidInputError(
            "Grammars need the package llguidance, which is not installed.",
            'pip install "retrieval_draft[grammar]"',
        ) from error
    return llguidance


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise InvalidInputError(f"{what} is a {type(given).__name__}; it must be a text.")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{what} has half of a surrogate pair: {error}.") from error
    return given


def _literal(text: str) -> str:
    """A text as rules quote it."""
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
