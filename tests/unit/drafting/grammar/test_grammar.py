"""The description of a grammar: its kinds, its limits, and its source for llguidance."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from retrieval_draft import Grammar
from retrieval_draft.drafting.grammar.grammar import ANY_WHITESPACE, import_llguidance
from retrieval_draft.errors import InvalidInputError


def source(grammar: Grammar) -> Any:
    return json.loads(grammar.compiled_from(lambda text: [text]))["grammars"]


def test_equal_descriptions_are_one_key() -> None:
    schema = {"type": "string"}
    assert Grammar.json_schema(schema) == Grammar.json_schema(json.dumps(schema))
    assert len({Grammar.json_schema(schema), Grammar.json_schema(schema), Grammar.json_object()}) == 2
    assert Grammar.json_schema(True) == Grammar.json_schema({})


def test_a_schema_cannot_set_the_options_of_its_compiler() -> None:
    schema = {"type": "string", "x-guidance": {"lenient": True}}
    (body,) = source(Grammar.json_schema(schema))
    assert body["json_schema"]["x-guidance"]["lenient"] is False
    (body,) = source(Grammar.json_schema(schema, whitespace=ANY_WHITESPACE, strict=False))
    options = body["json_schema"]["x-guidance"]
    assert options["lenient"]
    assert options["whitespace_pattern"] == ANY_WHITESPACE
    assert schema["x-guidance"] == {"lenient": True}, "the caller's is left as it is"


def test_text_around_a_grammar_is_split_at_special_tokens() -> None:
    grammar = Grammar.json_object().within("<a>b", "c").within("d", "")
    made = json.loads(grammar.compiled_from(lambda text: text.replace("<a>", "|7|").split("|") or []))
    assert made["grammars"][0]["lark_grammar"] == 'start: "d" "7" "b" @body "c"'
    made = json.loads(grammar.compiled_from(lambda text: [7, text]))
    assert made["grammars"][0]["lark_grammar"] == 'start: <[7]> "d<a>b" @body <[7]> "c"'


def test_gbnf_becomes_lark() -> None:
    assert "::=" not in Grammar.rules('root ::= "a" root | "b"').source
    assert Grammar.rules('start: "a"').source == 'start: "a"'
    with pytest.raises(InvalidInputError, match="no GBNF"):
        Grammar.rules('root ::= "a')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema("{"), "no JSON"),
        (lambda: Grammar.json_schema("[]"), "must be an object"),
        (lambda: Grammar.json_schema({"a": object()}), "no JSON"),
        (lambda: Grammar.json_schema(False), "must be an object"),
        (lambda: Grammar.choice([]), "1 to 4096"),
        (lambda: Grammar.choice("ab"), "list of texts"),
        (lambda: Grammar.choice(["a", 1]), "int"),
        (lambda: Grammar.choice(None), "NoneType"),
        (lambda: Grammar.regex(b"a"), "bytes"),
        (lambda: Grammar.regex("a\ud800"), "surrogate"),
        (lambda: Grammar.regex("a" * (1 << 15)), "16384 are allowed"),
        (lambda: Grammar.rules("a" * (1 << 16)), "32768 are allowed"),
        (lambda: Grammar.json_object().within("a" * (1 << 18), ""), "262144 are allowed"),
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidInputError, match=r"retrieval_draft\[grammar\]"):
        import_llguidance()
