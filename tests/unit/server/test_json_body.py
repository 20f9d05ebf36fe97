"""Bodies of requests: read to the first error, and never more than a few times their size."""

from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_body
from retrieval_draft.server.openai.chat_request import CHAT
from retrieval_draft.server.openai.completions_request import COMPLETION

LIMIT = 4 << 20
MOST = 64


def read_completion(body: bytes) -> Any:
    request = decode_body(body, COMPLETION)
    request.check()
    return request, request.prompts(MOST), request.bias, request.stops, request.references


def read_chat(body: bytes) -> Any:
    request = decode_body(body, CHAT)
    request.check()
    return request, request.conversation, request.variables, request.bias


def filled(item: str, head: str, tail: str, size: int = LIMIT) -> bytes:
    content = item.encode()
    count = (size - len(head) - len(tail)) // (len(content) + 1)
    return head.encode() + b",".join([content] * count) + tail.encode()


SAID = '{"messages":[{"role":"user","content":"a"}],'
LARGE = {
    "ids": (read_completion, filled("1", '{"prompt":[', "]}")),
    "large ids": (read_completion, filled("31999", '{"prompt":[', "]}")),
    "wrong at the end": (read_completion, filled("1", '{"prompt":[', ",-1]}")),
    "negative": (read_completion, filled("-1", '{"prompt":[', "]}")),
    "booleans": (read_completion, filled("true", '{"prompt":[', "]}")),
    "texts": (read_completion, filled('"a"', '{"prompt":[', "]}")),
    "empty lists": (read_completion, filled("[]", '{"prompt":[', "]}")),
    "lists": (read_completion, filled("[1]", '{"prompt":[', "]}")),
    "objects": (read_completion, filled("{}", '{"prompt":[', "]}")),
    "a text": (read_completion, filled("\\u00e9", '{"prompt":"', '"}')),
    "documents": (read_completion, filled('""', '{"prompt":"a","documents":[', "]}")),
    "stops": (read_completion, filled('"a"', '{"prompt":"a","stop":[', "]}")),
    "bias": (read_completion, filled('"1":1', '{"prompt":"a","logit_bias":{', "}}")),
    "wrong bias": (read_completion, filled('"x":""', '{"prompt":"a","logit_bias":{', "}}")),
    "unknown fields": (read_completion, filled('"x":1', '{"prompt":"a",', "}")),
    "a field left out": (read_completion, filled("[]", '{"prompt":"a","guided_json":[', "]}")),
    "an ignored field": (read_completion, filled("[]", '{"prompt":"a","metadata":[', "]}")),
    "nested": (read_completion, b'{"prompt":' + b"[" * LIMIT),
    "nested where it is ignored": (read_completion, b'{"prompt":"a","metadata":' + b"[" * LIMIT),
    "allowed tokens": (read_completion, filled("1", '{"prompt":"a","allowed_token_ids":[', "]}")),
    "messages": (read_chat, filled('{"role":"user"}', '{"messages":[', "]}")),
    "messages of nothing": (read_chat, filled("{}", '{"messages":[', "]}")),
    "parts": (
        read_chat,
        filled('{"type":"text","text":""}', '{"messages":[{"role":"user","content":[', "]}]}"),
    ),
    "parts of nothing": (read_chat, filled("0", '{"messages":[{"role":"user","content":[', "]}]}")),
    "tool calls": (
        read_chat,
        filled('{"function":{"name":""}}', '{"messages":[{"role":"assistant","tool_calls":[', "]}]}"),
    ),
    "variables": (read_chat, filled('"a":1', SAID + '"chat_template_kwargs":{', "}}")),
    "prediction": (read_chat, filled('{"type":""}', SAID + '"prediction":{"content":[', "]}}")),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_body_within_the_limit_costs_little(name: str) -> None:
    read, body = LARGE[name]

    def once() -> None:
        with suppress(ApiError):
            read(body)

    tracemalloc.start()
    once()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * LIMIT
    times = []
    for _ in range(3):
        began = time.process_time()
        once()
        times.append(time.process_time() - began)
    assert min(times) < 0.2  # 45 ms at most on a quiet machine


@pytest.mark.parametrize(
    "fields",
    [
        {"n": True}, {"max_tokens": True}, {"seed": False}, {"temperature": True}, {"top_p": False},
        {"top_k": True}, {"best_of": True}, {"logprobs": True}, {"min_tokens": True},
        {"presence_penalty": False}, {"allowed_token_ids": [True]}, {"logit_bias": {"1": True}},
        {"stream": 1}, {"echo": "yes"}, {"n": "2"}, {"max_tokens": 1.5}, {"n": 0}, {"n": 1 << 70},
        {"best_of": 129}, {"seed": 1 << 63}, {"top_p": 0}, {"top_p": 1.1}, {"temperature": -1},
        {"temperature": 1e300}, {"stop": [""]}, {"stop": ""}, {"stop": [1]}, {"stop": ["a"] * 17},
        {"stop": {"a": 1}}, {"logit_bias": {"a": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"1.0": 1}},
        {"logit_bias": {"1": 101}}, {"logit_bias": [1]}, {"documents": [1]}, {"documents": ["a"] * 65},
        {"share": "everything"}, {"stream_options": {"other": 1}}, {"prediction": {"content": 1}},
        {"prompt": [True, False]}, {"prompt": [[1], "a"]}, {"prompt": ["a", 1]}, {"prompt": [1, "a"]},
        {"prompt": []}, {"prompt": [[]]}, {"prompt": None}, {"prompt": [-1]}, {"prompt": [1 << 31]},
        {"prompt": {"a": 1}}, {"prompt": [1.5]}, {"prompt": [[1]] * (MOST + 1)},
        {"prompt": ["a"] * (MOST + 1)},
        {"max_tokens": 0}, {"never_heard_of": 1},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        read_completion(json.dumps({"prompt": "a", **fields}).encode())
    name = next(iter(fields))
    assert raised.value.status == 400
    assert raised.value.param == name
    assert name in raised.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'"a"', b"null", b'{"prompt":NaN}',
                                  b'{"prompt":"\xff"}',
                                  b'{"prompt":"\\ud800"}', b'\xff\xfe{}', b'{"prompt":"a"}x'])  # fmt: skip
def test_what_is_no_such_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        read_completion(body)
    assert raised.value.status == 400


@pytest.mark.parametrize(
    "value",
    [{"guided_json": {}}, {"guided_json": None}, {"use_beam_search": False}, {"length_penalty": 1.0},
     {"skip_special_tokens": True}, {"user": "a"}, {"metadata": {"a": "b"}}, {"store": True}, {"suffix": ""},
     {"stop": None}, {"stop": []}, {"logit_bias": {}}, {"documents": None},
     {"response_format": {"type": "text"}},
     {"stream_options": {"include_usage": True, "include_obfuscation": False}}, {"logprobs": False}],
    ids=json.dumps,
)  # fmt: skip
def test_what_changes_nothing_is_let_through(value: dict[str, Any]) -> None:
    request, prompts, *_ = read_completion(json.dumps({"prompt": "a", **value}).encode())
    assert (prompts, request.stops, request.alternatives) == (["a"], [], None)


@pytest.mark.parametrize(
    "value",
    [{"use_beam_search": True}, {"length_penalty": 2}, {"prompt_logprobs": 1}, {"truncate_prompt_tokens": 1},
     {"suffix": "a"}, {"min_tokens": 5, "max_tokens": 4}],
    ids=json.dumps,
)  # fmt: skip
def test_what_would_change_the_reply_is_refused_by_name(value: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        read_completion(json.dumps({"prompt": "a", **value}).encode())
    assert next(iter(value)) in raised.value.message


@pytest.mark.parametrize(
    "value",
    [{"functions": [{}]}, {"function_call": {"name": "f"}},
     {"n": 2, "best_of": 1}, {"modalities": ["audio"]},
     {"chat_template": "a"}, {"top_logprobs": 1}, {"web_search_options": {"a": 1}}],
    ids=json.dumps,
)  # fmt: skip
def test_what_would_change_a_chat_is_refused_by_name(value: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        read_chat(json.dumps({"messages": [{"role": "user", "content": "a"}], **value}).encode())
    assert next(iter(value)) in raised.value.message


def test_arguments_of_tools_are_objects_for_templates() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    _, conversation, *_ = read_chat(json.dumps(body).encode())
    assert conversation[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert conversation[0]["content"] == ""


def test_a_message_with_what_is_not_known_is_refused() -> None:
    for wrong in (
        {"role": "user", "other": 1},
        {"role": 1},
        {"content": "a"},
        {"role": "user", "audio": {"id": "a"}},
    ):
        with pytest.raises(ApiError, match="messages"):
            read_chat(json.dumps({"messages": [wrong]}).encode())
