"""The grammar that a request's fields ask for, by the names of OpenAI, vLLM and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import Raw, Struct, field
from msgspec.json import Decoder

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.grammar.grammar import ANY_WHITESPACE, Grammar
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.generation.grammars import grammar_processor
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, is_absent
from retrieval_draft.server.openai.generation_request import OFF, GenerationFields

__all__ = ["AskedGrammar", "asked_grammar", "check_grammar", "schema_grammar"]

_ANY = Decoder(Any)
_OBJECT = Decoder(dict[str, Any])
_TEXT = Decoder(str)


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar that a request asks for.

    Attributes:
        grammar: The grammar.
        field: The field that asks for it, for errors.
    """

    grammar: Grammar
    field: str


class _JsonSchema(Struct):
    """The schema within `response_format`."""

    schema: Raw = field(default_factory=Raw)
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class _ResponseFormat(Struct, forbid_unknown_fields=True):
    """`response_format` of OpenAI."""

    type: str
    json_schema: _JsonSchema | None = None


class _StructuredOutputs(Struct, forbid_unknown_fields=True):
    """`structured_outputs` of vLLM."""

    json: Raw = field(default_factory=Raw)
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None


_FORMAT = Decoder(_ResponseFormat)
_OUTPUTS = Decoder(_StructuredOutputs)
_CHOICES = Decoder(list[str])


def schema_grammar(
    schema: Mapping[str, Any] | bool | str,
    name: str,
    *,
    strict: bool = True,
    whitespace: str | None = None,
) -> AskedGrammar:
    """The grammar of JSON that a schema describes.

    Args:
        schema: The schema, or its JSON text.
        name: The field that asks for it, for errors.
        strict: Whether keywords that cannot be followed are refused; else they are ignored.
        whitespace: As of `Grammar.json_schema`.

    Raises:
        ApiError: It is no schema. What it asks for is checked by `check_grammar`.
    """
    return _asked(name, lambda: Grammar.json_schema(schema, whitespace=whitespace, strict=strict))


def asked_grammar(fields: GenerationFields) -> AskedGrammar | None:
    """The grammar that a request asks for; None for any text.

    Raises:
        ApiError: A field has another type, or two of them ask for one.
    """
    found: AskedGrammar | None = None
    for name, read in _READERS.items():
        raw = getattr(fields, name)
        asked = None if is_absent(raw, *OFF) else read(raw, name)
        if asked is not None and found is not None:
            raise ApiError(400, f"{found.field} and {name} each ask for a grammar; give one.", name)
        found = asked if found is None else found
    if found is not None:
        for name in ("min_tokens", "ignore_eos"):
            if getattr(fields, name):
                raise ApiError(
                    400, f"{name} does not go together with {found.field}, which sets the end.", name
                )
    return found


def check_grammar(drafter: RetrievalDrafter, asked: AskedGrammar) -> None:
    """Compiles a grammar, which is kept then. Takes milliseconds, or seconds for a large one.

    Raises:
        ApiError: It cannot be followed; the message names the field and the reason.
    """
    model: Any = drafter.target.model
    ends = model.generation_config.eos_token_id
    _raising(asked.field, lambda: grammar_processor(model, drafter.tokenizer, [asked.grammar], ends))


def _of_response_format(raw: Raw, name: str) -> AskedGrammar | None:
    given = decode_field(raw, _FORMAT, name)
    if given.type == "text":
        return None
    if given.type == "json_object":
        return _asked(name, Grammar.json_object)
    if given.type != "json_schema":
        kind = given.type[:40]
        raise ApiError(400, f"{name}: the type {kind!r} is none of text, json_object and json_schema.", name)
    if given.json_schema is None or is_absent(given.json_schema.schema):
        raise ApiError(400, f"{name}.json_schema.schema: required.", name)
    schema = decode_field(given.json_schema.schema, _OBJECT, name)
    # Without strict OpenAI's API tries its best; so keywords that cannot be followed are left to the model.
    return schema_grammar(schema, name, strict=bool(given.json_schema.strict))


def _of_structured_outputs(raw: Raw, name: str) -> AskedGrammar | None:
    given = decode_field(raw, _OUTPUTS, name)
    whitespace = given.whitespace_pattern
    if whitespace is None and given.disable_any_whitespace is False:
        whitespace = ANY_WHITESPACE
    if given.disable_additional_properties:
        raise ApiError(
            400, f"{name}.disable_additional_properties is not supported; say so in the schema.", name
        )
    found: list[Callable[[], AskedGrammar]] = []
    if not is_absent(given.json):
        found.append(lambda: _of_schema(given.json, f"{name}.json", whitespace))
    if given.json_object:
        found.append(lambda: _asked(name, lambda: Grammar.json_object(whitespace=whitespace)))
    if given.regex is not None:
        found.append(lambda: _asked(f"{name}.regex", Grammar.regex, given.regex))
    if given.choice is not None:
        found.append(lambda: _asked(f"{name}.choice", Grammar.choice, given.choice))
    if given.grammar is not None:
        found.append(lambda: _asked(f"{name}.grammar", Grammar.rules, given.grammar))
    if len(found) > 1:
        raise ApiError(400, f"{name} asks for {len(found)} grammars; give one.", name)
    return found[0]() if found else None


def _of_schema(raw: Raw, name: str, whitespace: str | None = None) -> AskedGrammar:
    schema = decode_field(raw, _ANY, name)
    if not isinstance(schema, dict | str | bool):
        raise ApiError(400, f"{name} is no schema; it must be an object, or its JSON text.", name)
    return schema_grammar(schema, name, whitespace=whitespace)


def _of_regex(raw: Raw, name: str) -> AskedGrammar:
    return _asked(name, Grammar.regex, decode_field(raw, _TEXT, name))


def _of_choice(raw: Raw, name: str) -> AskedGrammar:
    return _asked(name, Grammar.choice, decode_field(raw, _CHOICES, name))


def _of_rules(raw: Raw, name: str) -> AskedGrammar:
    return _asked(name, Grammar.rules, decode_field(raw, _TEXT, name))


_READERS: Mapping[str, Callable[[Raw, str], AskedGrammar | None]] = {
    "response_format": _of_response_format,
    "structured_outputs": _of_structured_outputs,
    "guided_json": _of_schema,
    "guided_regex": _of_regex,
    "guided_choice": _of_choice,
    "guided_grammar": _of_rules,
    "grammar": _of_rules,
    "json_schema": _of_schema,
}


def _asked(name: str, make: Callable[..., Grammar], *given: Any) -> AskedGrammar:
    return AskedGrammar(_raising(name, lambda: make(*given)), name)


def _raising(name: str, call: Callable[[], Any]) -> Any:
    """The result of `call`, its errors as those of a field."""
    try:
        return call()
    except RetrievalDraftError as error:
        message = f"{name}: {error.message} {error.hint}".rstrip()
        raise ApiError(400, message, name.partition(".")[0]) from error
