"""OpenAI's responses, whole and streamed, by the official client; and the routes of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from retrieval_draft.drafter import RetrievalDrafter
from tests.support.scripted import byte_tokenizer, openai_client, scripted_server
from tests.support.servers import MODEL, Running

CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "é"}}\n</tool_call>'
SCRIPTS = [f"<think>\nHm.\n</think>\nI look.\n{CALL}\n{CALL}", "Plain text. 🎈", "x" * 60]
TOOLS: list[Any] = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": None}]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with scripted_server(SCRIPTS) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai_client(running)


def comparable(response: Any) -> Any:
    """A response without ids and times."""
    fields = response.model_dump()
    for each in fields["output"]:
        each.pop("id")
        each.pop("call_id", None)
    return {name: value for name, value in fields.items() if name not in ("id", "created_at", "output")}, [
        {key: value for key, value in item.items() if key != "parsed_arguments"}
        | ({"content": [{**part, "parsed": None} for part in item["content"]]} if item.get("content") else {})
        for item in fields["output"]
    ]


def test_a_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="say 1", instructions="Be brief.", temperature=0, metadata={"a": "b"}
    )
    assert (response.status, response.output_text) == ("completed", "Plain text. 🎈")
    assert (response.instructions, response.metadata, response.tools) == ("Be brief.", {"a": "b"}, [])
    usage: Any = response.usage
    assert usage.output_tokens == len("Plain text. 🎈".encode()) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    cut = client.responses.create(model=MODEL, input="say 2", max_output_tokens=9)
    assert (cut.status, cut.output_text) == ("incomplete", "x" * 9)
    details: Any = cut.incomplete_details
    assert details.reason == "max_output_tokens"


def test_items_of_a_turn_and_the_next_one(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0}
    response = client.responses.create(input=[{"role": "user", "content": "say 0"}], **fields)
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert response.output_text == "I look."
    output: list[Any] = list(response.output)
    reasoning, _, call, other = output
    assert reasoning.content[0].text == "Hm."
    assert json.loads(call.arguments) == {"path": "é"}
    assert call.call_id != other.call_id
    again = client.responses.create(
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "ab"}]},
            *[item.model_dump(exclude_none=True) for item in output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "say 1"},
        ],
        **fields,
    )
    assert again.output_text == "Plain text. 🎈"
    alone = client.responses.create(input="say 0", parallel_tool_calls=False, **fields)
    assert [item.type for item in alone.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_stream_ends_with_the_whole_response(client: openai.OpenAI, number: int) -> None:
    fields: dict[str, Any] = {"model": MODEL, "input": f"say {number}", "tools": TOOLS, "temperature": 0}
    whole = client.responses.create(**fields)
    kinds, deltas = [], 0
    with client.responses.stream(**fields) as stream:
        for index, event in enumerate(stream):
            assert event.sequence_number == index
            kinds.append(event.type)
            deltas += event.type == "response.output_text.delta"
        final = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") > 0
    assert deltas > 2
    assert comparable(final) == comparable(whole)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"summary": "auto"}}, "reasoning"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
def test_fields_are_refused_by_name(running: Running, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{running.url}/v1/responses", json={"input": "ab", **fields})
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


def test_a_call_that_a_stop_string_cuts_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="say 0", tools=TOOLS, extra_body={"stop": "é"})
    call: Any = response.output[-1]
    assert (call.type, call.status, call.arguments) == ("function_call", "incomplete", '{"path": "')
    assert response.status == "completed"


def test_allowed_tools(running: Running, client: openai.OpenAI) -> None:
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}
    other = {**TOOLS[0], "name": "run"}
    response = client.responses.create(
        model=MODEL, input="say 0", tools=[*TOOLS, other], tool_choice=allowed, temperature=0
    )
    assert response.tool_choice.model_dump() == allowed  # type: ignore[union-attr]
    alone = client.responses.create(model=MODEL, input="say 0", tools=TOOLS, temperature=0)
    assert comparable(response)[1] == comparable(alone)[1]
    assert response.usage is not None
    assert alone.usage is not None
    assert response.usage.input_tokens == alone.usage.input_tokens
    allowed["tools"][0]["name"] = "another"
    refused = post(running, "v1/responses", input="ab", tools=TOOLS, tool_choice=allowed)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


TURN = byte_tokenizer().convert_tokens_to_ids("<|turn|>")
FIELDS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "logit_bias": {"logit_bias": {"5": 100}},
    "structured_outputs": {"structured_outputs": {"choice": ["yes", "no"]}},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {"0": 100}},
    "skip_special_tokens": {"skip_special_tokens": False, "logit_bias": {str(TURN): 100}},
    "include_stop_str_in_output": {
        "include_stop_str_in_output": True,
        "stop": "%%",
        "logit_bias": {"5": 100},
    },
    "priority": {"priority": -3},
    "cache_salt": {"cache_salt": "a"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_means_what_it_does_in_a_chat(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "structured_outputs":
        pytest.importorskip("llguidance")
    seen: list[Any] = []
    submit, salted = running.engine.submit, RetrievalDrafter.use_prefixes

    def submitted(job: Any) -> None:
        seen.append(("priority", job.priority))
        submit(job)

    def used(self: Any, requests: Any, salt: str = "") -> None:
        seen.append(("cache_salt", salt))
        salted(self, requests, salt)

    monkeypatch.setattr(running.engine, "submit", submitted)
    monkeypatch.setattr(RetrievalDrafter, "use_prefixes", used)

    def both(fields: dict[str, Any]) -> list[tuple[str, int]]:
        response = post(running, "v1/responses", input="ab", max_output_tokens=12, temperature=0, **fields)
        messages = [{"role": "user", "content": "ab"}]
        chat = post(running, "v1/chat/completions", messages=messages, max_tokens=12, temperature=0, **fields)
        text = "".join(part["text"] for item in response.json()["output"] for part in item["content"])
        told = chat.json()
        tokens = response.json()["usage"]["output_tokens"], told["usage"]["completion_tokens"]
        return list(zip((text, told["choices"][0]["message"]["content"]), tokens, strict=True))

    asked, own = FIELDS[name], FIELDS[name][name]
    told, other = both(asked)
    assert told == other
    if name in ("priority", "cache_salt"):
        assert [value for key, value in seen if key == name and value] == [own, own]
    else:
        assert told != both({key: value for key, value in asked.items() if key != name})[0]


def post(running: Running, path: str, **fields: Any) -> Any:
    return httpx.post(f"{running.url}/{path}", json=fields)


def test_tokens_and_back(running: Running) -> None:
    text = "ab é<|turn|>"
    body = post(running, "tokenize", prompt=text, return_token_strs=True).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) == len("ab é".encode()) + 1
    assert body["max_model_len"] == 2048
    assert post(running, "detokenize", tokens=body["tokens"]).json() == {"prompt": text}
    messages = [{"role": "user", "content": "ab"}]
    chat = post(running, "tokenize", messages=messages, add_generation_prompt=False).json()
    assert post(running, "detokenize", tokens=chat["tokens"]).json() == {"prompt": "<|turn|>user\nab"}
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert post(running, "tokenize", messages=messages, tools=tools).json()["count"] > chat["count"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user"}]}, "messages"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"prompt": "x" * 100_000}, "prompt"),
        ("detokenize", {"tokens": [1 << 20]}, "tokens"),
        ("detokenize", {}, "tokens"),
        ("v1/embeddings", {"input": "a"}, "model"),
    ],
)
def test_tokens_are_refused_by_name(running: Running, path: str, fields: dict[str, Any], param: str) -> None:
    response = post(running, path, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
