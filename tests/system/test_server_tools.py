"""Calls of tools by the official client, its streaming helpers included, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.support.scripted import byte_tokenizer, openai_client, scripted_server
from tests.support.servers import MODEL, Running

CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "a/{b}.py", "é": ["</tool_call>"]}}\n</tool_call>'
OTHER = '<tool_call>{"name": "run", "arguments": {}}</tool_call>'
SCRIPTS = [
    f"I look.\n{CALL}\n{OTHER}",
    "<think>\nHm, a file.\n</think>\n\nNo call is needed. 🎈 ",
    CALL,
    '<tool_call>{"name": "look", "arguments": {"path": "a long path that is cut',
    "Hm.</think>Yes",
    "<tool_call>no call</tool_call>",
    '<tool_call>\n{"name": "look", "arguments": {"path": "a"}}\n</tool_call>',
    '{"size": 7}',
]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Reads a file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "run"}},
]
ARGUMENTS = {"path": "a/{b}.py", "é": ["</tool_call>"]}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with scripted_server(SCRIPTS) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai_client(running)


def asked(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"say {number}"}]
    return {"model": MODEL, "messages": messages, "tools": TOOLS, "max_tokens": 400, "temperature": 0, **more}


def test_calls_are_parsed(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked(0)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["look", "run"]
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS, {}]
    assert len({call.id for call in calls}) == 2
    assert all(call.type == "function" for call in calls)
    alone = client.chat.completions.create(**asked(2)).choices[0]
    assert alone.message.content is None


def test_a_stream_has_the_shape_of_openai(client: openai.OpenAI) -> None:
    seen: list[Any] = []
    reasons = []
    for chunk in client.chat.completions.create(**asked(0), stream=True):
        (choice,) = chunk.choices
        seen += choice.delta.tool_calls or []
        reasons.append(choice.finish_reason)
        if choice.finish_reason is not None:
            assert choice.delta.content is None
            assert choice.delta.tool_calls is None
    assert reasons[-1] == "tool_calls"
    assert not any(reasons[:-1])
    for index, name in enumerate(["look", "run"]):
        mine = [call for call in seen if call.index == index]
        first, *rest = mine
        assert (first.type, first.function.name, first.function.arguments) == ("function", name, "")
        assert first.id
        assert all(call.id is None and call.function.name is None and call.type is None for call in rest)
    pieces = [call.function.arguments for call in seen if call.index == 0]
    assert json.loads("".join(pieces)) == ARGUMENTS
    assert len(pieces) > 3, "they come while they are written"


def test_the_streaming_helper_of_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asked(0)) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert [event.name for event in done] == ["look", "run"]
    calls: Any = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS, {}]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")


def test_reasoning_is_apart(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(**asked(1))
    message: Any = response.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, a file.", "No call is needed. 🎈")
    assert message.tool_calls is None
    usage: Any = response.usage
    assert usage.completion_tokens_details.reasoning_tokens == len(">\nHm, a file.\n</think")
    begun = client.chat.completions.create(**asked(4), extra_body={"chat_template_kwargs": {"think": True}})
    other: Any = begun.choices[0].message
    assert (other.reasoning_content, other.content) == ("Hm.", "Yes")
    plain = client.chat.completions.create(**{**asked(1), "tools": openai.omit})
    assert plain.choices[0].message.content == "No call is needed. 🎈"


def test_a_call_that_is_cut_ends_by_its_length(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked(3, max_tokens=60)).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or []
    assert call.function.arguments == '{"path": "a long pa'
    for number, text in ((5, SCRIPTS[5]), (0, "I look.")):
        message = client.chat.completions.create(**asked(number)).choices[0].message
        assert message.content == text
    early = client.chat.completions.create(**asked(2, max_tokens=20)).choices[0]
    assert (early.message.content, early.message.tool_calls) == (CALL[:20], None)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("stop", "arguments", "reason"),
    [
        ('"é"', '{"path": "a/{b}.py", ', "stop"),  # within the arguments
        ('": {"path', "", "stop"),  # after the name
        ("}\n</tool", json.dumps(ARGUMENTS, ensure_ascii=False), "tool_calls"),  # after the arguments
    ],
)
def test_a_call_that_a_stop_string_cuts_is_not_called_whole(
    client: openai.OpenAI, stop: str, arguments: str, reason: str, stream: bool
) -> None:
    told, ends = "", list[str]()
    if stream:
        for chunk in client.chat.completions.create(**asked(2, stop=stop), stream=True):
            choice: Any = chunk.choices[0]
            told += "".join(call.function.arguments for call in choice.delta.tool_calls or [])
            ends += [choice.finish_reason] if choice.finish_reason else []
    else:
        choice = client.chat.completions.create(**asked(2, stop=stop)).choices[0]
        told, ends = choice.message.tool_calls[0].function.arguments, [choice.finish_reason]
    assert (told, ends) == (arguments, [reason])


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_part_of_the_tools_is_allowed(running: Running, client: openai.OpenAI, mode: str) -> None:
    pytest.importorskip("llguidance")
    names = [{"type": "function", "function": {"name": "run"}}]
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
    bias = {str(byte_tokenizer().convert_tokens_to_ids("h")): -100}  # as below
    fields = constrained(tool_choice=allowed, logit_bias=bias, temperature=1.2, seed=3, max_tokens=60)
    message = client.chat.completions.create(**fields).choices[0].message
    called = {call.function.name for call in message.tool_calls or []}
    assert called == {"run"} if mode == "required" else called <= {"run"}
    alone = {**fields, "tools": fields["tools"][1:], "tool_choice": mode}
    other = client.chat.completions.create(**alone).choices[0].message
    assert (message.content, called) == (
        other.content,
        {call.function.name for call in other.tool_calls or []},
    )
    unknown = [{"type": "function", "function": {"name": "x"}}]
    bad: list[Any] = [{"mode": mode, "tools": []}, {"mode": mode, "tools": unknown}, {"mode": mode}]
    for wrong in (*bad, {"mode": "none", "tools": names}, {"mode": mode, "tools": names, "more": 1}):
        refused = httpx.post(
            f"{running.url}/v1/chat/completions",
            json={**fields, "tool_choice": {"type": "allowed_tools", "allowed_tools": wrong}},
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


def test_one_call_where_more_are_not_wanted(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked(0, parallel_tool_calls=False)).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or []] == ["look"]


def test_none_calls_nothing(client: openai.OpenAI) -> None:
    shown = client.chat.completions.create(**asked(2))
    choice = client.chat.completions.create(**asked(2, tool_choice="none"))
    assert (choice.choices[0].message.content, choice.choices[0].finish_reason) == (CALL, "stop")
    assert shown.usage is not None
    assert choice.usage is not None
    assert choice.usage.prompt_tokens < shown.usage.prompt_tokens, "the model is not told of them"


def test_messages_of_tools_come_back(client: openai.OpenAI) -> None:
    """The template gets arguments as an object: text has no items()."""
    choice = client.chat.completions.create(**asked(0)).choices[0]
    messages = [
        {"role": "user", "content": "ab"},
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": (choice.message.tool_calls or [])[0].id, "content": "say 2"},
    ]
    again = client.chat.completions.create(**asked(0, messages=messages)).choices[0]
    assert again.finish_reason == "tool_calls"


def test_several_choices_and_log_probabilities(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(**asked(0, n=2, logprobs=True, temperature=1))
    assert [choice.finish_reason for choice in response.choices] == ["tool_calls"] * 2
    tokens = [0, 0]
    for chunk in client.chat.completions.create(**asked(0, n=2, logprobs=True, temperature=1), stream=True):
        for each in chunk.choices:
            if each.logprobs is not None:
                tokens[each.index] += len(each.logprobs.content or [])
    assert response.usage is not None
    assert sum(tokens) == response.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_fields_are_refused_by_name(running: Running, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{running.url}/v1/chat/completions", json=asked(0, **fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


STRICT: Any = {
    "type": "object",
    "properties": {"path": {"enum": ["a.py", "é/{b}.py"]}, "deep": {"$ref": "#/$defs/node"}},
    "required": ["path", "deep"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                       "additionalProperties": False}},
}  # fmt: skip


def constrained(*, strict: bool = True, **more: Any) -> dict[str, Any]:
    """A request for which nothing is scripted."""
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": STRICT, "strict": strict}},
        {"type": "function", "function": {"name": "run"}},
    ]
    messages = [{"role": "user", "content": "ab"}]
    return {"model": MODEL, "messages": messages, "tools": tools, "max_tokens": 200, **more}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=str)
@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 1.2, "seed": 4}], ids=str)
def test_a_call_that_is_required(client: openai.OpenAI, choice: Any, sampled: Any) -> None:
    pytest.importorskip("llguidance")
    # A model of random weights would think without end: its tags need an h, which is not forced there.
    bias = {str(byte_tokenizer().convert_tokens_to_ids("h")): -100}
    fields = constrained(tool_choice=choice, parallel_tool_calls=False, logit_bias=bias, **sampled)
    made = client.chat.completions.create(**fields)
    (call,) = made.choices[0].message.tool_calls or []
    assert made.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "look":
        assert arguments["path"] in ("a.py", "é/{b}.py")
        assert arguments["deep"]["n"] in (1, 2)
    else:
        assert (choice, arguments) == ("required", {})
    plain = client.chat.completions.create(**fields, extra_body={"speculative": {"enabled": False}})
    (other,) = plain.choices[0].message.tool_calls or []
    assert other.function == call.function, "drafted is undrafted"
    text = ""
    for chunk in client.chat.completions.create(**fields, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            text += (part.function and part.function.arguments) or ""
    assert text == call.function.arguments


def test_strict_tools_and_their_models(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")

    class Look(pydantic.BaseModel):
        path: str

    tool = openai.pydantic_function_tool(Look, name="look")
    parsed = client.chat.completions.parse(**{**asked(6), "tools": [tool]}).choices[0].message
    (call,) = parsed.tool_calls or []
    assert call.function.parsed_arguments == Look(path="a")
    free = client.chat.completions.create(**{**asked(1), "tools": [tool]}).choices[0].message
    assert free.content == "No call is needed. 🎈"


def test_a_reply_calls_tools_or_has_the_format_that_was_asked_for(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")

    class Found(pydantic.BaseModel):
        size: int

    schema = {"type": "json_schema", "json_schema": {"name": "found", "schema": Found.model_json_schema()}}
    called = client.chat.completions.create(**asked(6), response_format=schema).choices[0]
    (call,) = called.message.tool_calls or []
    assert (call.function.name, called.finish_reason, called.message.content) == ("look", "tool_calls", None)
    told = client.chat.completions.create(**asked(7), response_format=schema).choices[0]
    assert (told.message.content, told.message.tool_calls) == ('{"size": 7}', None)
    bias = {str(byte_tokenizer().convert_tokens_to_ids("h")): -100}  # as above
    required = constrained(tool_choice="required", response_format=schema, temperature=0, logit_bias=bias)
    assert client.chat.completions.create(**required).choices[0].message.tool_calls
    answer = client.responses.create(
        model=MODEL,
        input="say 6",
        tools=[{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}],
        text={"format": {"type": "json_schema", "name": "found", "schema": Found.model_json_schema()}},
    )
    assert [item.type for item in answer.output] == ["function_call"]


@pytest.mark.parametrize("name", ["min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"])
def test_what_does_not_go_with_a_required_call(running: Running, name: str) -> None:
    value = {"min_tokens": 1, "ignore_eos": True, "allowed_token_ids": [1], "bad_words": ["a"]}[name]
    response = httpx.post(
        f"{running.url}/v1/chat/completions", json=constrained(tool_choice="required", **{name: value})
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    wrong = constrained(tool_choice="required")
    wrong["tools"][0]["function"]["parameters"] = {"type": "nothing"}
    response = httpx.post(f"{running.url}/v1/chat/completions", json=wrong)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
