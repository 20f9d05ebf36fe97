"""The table of fields in docs/server.md has every field of every body."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_body
from retrieval_draft.server.openai.chat_request import ChatRequest
from retrieval_draft.server.openai.completions_request import CompletionRequest
from retrieval_draft.server.openai.responses_request import ResponsesRequest

DOCS = Path(__file__).parents[4] / "docs" / "server.md"


@pytest.mark.parametrize("body", [CompletionRequest, ChatRequest, ResponsesRequest])
def test_every_field_is_in_the_table(body: type) -> None:
    table = DOCS.read_text("utf-8").split("\n## Fields\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)", table))
    assert set(body.__struct_fields__) - named == set()


@pytest.mark.parametrize(
    ("body", "module", "name"),
    [
        (CompletionRequest, "openai.types.completion_create_params", "CompletionCreateParamsBase"),
        (ChatRequest, "openai.types.chat.completion_create_params", "CompletionCreateParamsBase"),
        (ResponsesRequest, "openai.types.responses.response_create_params", "ResponseCreateParamsBase"),
    ],
)
def test_every_field_of_openai_s_package_is_known(body: Any, module: str, name: str) -> None:
    pytest.importorskip("openai")
    params = getattr(importlib.import_module(module), name)
    assert set(params.__annotations__) - set(body.__struct_fields__) == set()


@pytest.mark.parametrize("body", [CompletionRequest, ChatRequest])
def test_each_refused_field_may_be_absent_null_or_neutral(body: Any) -> None:
    start = {"prompt": "ab"} if body is CompletionRequest else {"messages": [{"role": "user"}]}
    neutral: dict[str, Any] = {
        "include_reasoning": True, "return_mm_kwargs": True, "spaces_between_special_tokens": True,
        "stream_interval": 1, "routed_experts_prompt_start": 0, "thinking_token_budget": -1,
        "watermarking": False, "length_penalty": 1.0, "vllm_xargs": None, "kv_transfer_params": {},
        "truncation_side": None,
    }  # fmt: skip

    def check(fields: dict[str, Any]) -> None:
        decode_body(msgspec.json.encode(start | fields), msgspec.json.Decoder(body)).check()

    check(neutral)
    for name, value in {**dict.fromkeys(neutral, "x"), "include_reasoning": False, "stream_interval": 8,
                        "thinking_token_budget": 0, "logprob_token_ids": [3]}.items():  # fmt: skip
        with pytest.raises(ApiError) as raised:
            check({name: value})
        assert raised.value.param == name


@pytest.mark.parametrize(
    "field",
    [{"logit_bias": {"5\n": 1}}, {"tools": [{"type": "function", "function": {"name": "look\n"}}]}],
    ids=str,
)
def test_names_and_ids_end_before_a_line_break(field: dict[str, Any]) -> None:
    body = decode_body(msgspec.json.encode({"messages": [], **field}), msgspec.json.Decoder(ChatRequest))
    with pytest.raises(ApiError) as raised:
        assert body.bias or body.tool_use
    assert raised.value.param in field
