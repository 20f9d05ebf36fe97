"""The grammar that a request asks for, under every name, and the errors of wrong ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw

from retrieval_draft import DraftConfig, Grammar, RetrievalDrafter
from retrieval_draft.drafting.grammar.grammar import ANY_WHITESPACE
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.generation_request import GenerationFields
from retrieval_draft.server.openai.prepare import prepare_request
from retrieval_draft.server.openai.structured_outputs import asked_grammar, check_grammar, schema_grammar
from tests.support.grammars import json_model, json_tokenizer
from tests.support.jobs import empty_job, loaded_for

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
DRAFTER = RetrievalDrafter.for_model(json_model(), json_tokenizer(), config=DraftConfig(nodes=4))


def fields(**given: Any) -> GenerationFields:
    options = {
        name: value
        if name in ("min_tokens", "ignore_eos", "temperature")
        else Raw(json.dumps(value).encode())
        for name, value in given.items()
    }
    return GenerationFields(**options)


@pytest.mark.parametrize(
    ("name", "value", "grammar"),
    [
        ("response_format", {"type": "json_object"}, Grammar.json_object()),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            Grammar.json_schema(SCHEMA),
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            Grammar.json_schema(SCHEMA, strict=False),
        ),
        ("guided_json", SCHEMA, Grammar.json_schema(SCHEMA)),
        ("guided_json", json.dumps(SCHEMA), Grammar.json_schema(SCHEMA)),
        ("json_schema", SCHEMA, Grammar.json_schema(SCHEMA)),
        ("guided_regex", "a+", Grammar.regex("a+")),
        ("guided_choice", ["a", "b"], Grammar.choice(["a", "b"])),
        ("guided_grammar", 'start: "a"', Grammar.rules('start: "a"')),
        ("grammar", 'root ::= "a"', Grammar.rules('root ::= "a"')),
        ("structured_outputs", {"json": SCHEMA}, Grammar.json_schema(SCHEMA)),
        (
            "structured_outputs",
            {"json": SCHEMA, "disable_any_whitespace": False},
            Grammar.json_schema(SCHEMA, whitespace=ANY_WHITESPACE),
        ),
        (
            "structured_outputs",
            {"json_object": True, "whitespace_pattern": " ?"},
            Grammar.json_object(whitespace=" ?"),
        ),
        ("structured_outputs", {"regex": "a"}, Grammar.regex("a")),
        ("structured_outputs", {"choice": ["a"]}, Grammar.choice(["a"])),
        ("structured_outputs", {"grammar": 'start: "a"'}, Grammar.rules('start: "a"')),
    ],
    ids=str,
)
def test_every_name_is_read(name: str, value: Any, grammar: Grammar) -> None:
    asked = asked_grammar(fields(**{name: value}))
    assert asked is not None
    assert asked.grammar == grammar
    check_grammar(DRAFTER, asked)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"response_format": {"type": "text"}, "guided_json": {}, "guided_choice": []},
        {"structured_outputs": {}, "grammar": "", "guided_regex": None, "json_schema": False},
    ],
)
def test_absence_is_no_grammar(given: dict[str, Any]) -> None:
    assert asked_grammar(fields(**given)) is None


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "'xml' is none of"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema: required"),
        ({"response_format": "json"}, "response_format", "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"not": {}}, "strict": True},
                }
            },
            "response_format",
            "Unimplemented keys",
        ),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": 7}, "guided_json", "no schema"),
        ({"guided_json": {"type": "foo"}}, "guided_json", "Invalid type: foo"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_regex": "a" * 20000}, "guided_regex", "16384 are allowed"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"grammar": 'root ::= "'}, "grammar", "no GBNF"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
        ({"structured_outputs": {"regex": "a", "json": SCHEMA}}, "structured_outputs", "2 grammars"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs.regex: "),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
            "structured_outputs",
            "say so in the schema",
        ),
        ({"guided_json": SCHEMA, "min_tokens": 3}, "min_tokens", "sets the end"),
        ({"guided_json": SCHEMA, "ignore_eos": True}, "ignore_eos", "sets the end"),
    ],
    ids=str,
)
def test_a_wrong_one_is_a_400_with_field_and_reason(given: dict[str, Any], param: str, message: str) -> None:
    loaded = loaded_for(DRAFTER, json_tokenizer(), 9)
    with pytest.raises(ApiError) as error:
        prepare_request(empty_job("job"), fields(**given), loaded, [[5, 6]], 4)
    assert (error.value.status, error.value.param) == (400, param)
    assert message in error.value.message


def test_a_schema_names_the_field_that_asks_for_it() -> None:
    asked = schema_grammar(SCHEMA, "tools")
    assert (asked.grammar, asked.field) == (Grammar.json_schema(SCHEMA), "tools")
    check_grammar(DRAFTER, asked)
    with pytest.raises(ApiError) as error:
        schema_grammar("[", "tools")
    assert error.value.param == "tools"


def test_the_request_of_the_engine_has_the_grammar() -> None:
    loaded = loaded_for(DRAFTER, json_tokenizer(), 9)
    given = fields(guided_json=SCHEMA, temperature=0.0)
    job = empty_job("job")
    prepare_request(job, given, loaded, [[5, 6]], 4)
    other = schema_grammar({"enum": ["ZQ"]}, "tools")
    prepare_request(job, given, loaded, [[5, 6]], 4, grammar=other)
    job.begin()
    first, second = (choice.request for choice in job.choices)
    assert first.grammar is not None
    assert second.grammar is not None
    assert json_tokenizer().decode(second.grammar.certain())[:2] == '"Z'
