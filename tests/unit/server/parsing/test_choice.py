"""Parsers by name, and as a chat template shows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from retrieval_draft.engine.compat import can_parse_responses
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.parsing.choice import REASONING_PARSERS, TOOL_PARSERS, ReplyParsing, reply_parsing
from retrieval_draft.server.parsing.deltas import Call, Message
from retrieval_draft.server.settings import REASONING_PARSERS as REASONING_OPTIONS
from retrieval_draft.server.settings import TOOL_PARSERS as TOOL_OPTIONS
from retrieval_draft.server.settings import ServerSettings

TEMPLATE = {
    "start_anchor": "assistant:",
    "fields": {
        "thinking": {"open": "<t>", "close": "</t>", "content": "text"},
        "tool_calls": {
            "open": "<c>", "close": "</c>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<e>", "content": "text"},
    },
}  # fmt: skip


def test_options_are_the_parsers() -> None:
    assert set(TOOL_OPTIONS) == {"auto", "none", *TOOL_PARSERS}
    assert set(REASONING_OPTIONS) == {"auto", "none", *REASONING_PARSERS}
    for option in ("tool_parser", "reasoning_parser"):
        with pytest.raises(InvalidInputError, match="There is no"):
            ServerSettings("m", **{option: "other"})


@pytest.mark.parametrize(
    ("source", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }} <think>", "qwen", "qwen"),
        ("[TOOL_CALLS]", "mistral", None),
        ("<|channel|>analysis", "gpt-oss", "gpt-oss"),
        ("<｜tool▁calls▁begin｜> <think>", "deepseek", "qwen"),
        ("<|tool_call> <|channel>thought", "gemma", "gemma"),
        ("<|python_tag|>", "llama3", None),
        ("{{ messages }}", None, None),
    ],
)
def test_a_chat_template_shows_the_family(source: str, tools: Any, reasoning: Any) -> None:
    tokenizer = SimpleNamespace(chat_template=source)
    assert reply_parsing(tokenizer, None) == ReplyParsing(tools, reasoning)
    assert reply_parsing(SimpleNamespace(chat_template=None), source) == ReplyParsing(tools, reasoning)
    assert reply_parsing(tokenizer, None, "none", "none") == ReplyParsing()
    assert reply_parsing(tokenizer, None, "llama3", "none") == ReplyParsing("llama3")


def test_reasoning_may_begin_in_the_prompt_but_not_in_a_user_s_words() -> None:
    parsing = ReplyParsing("qwen", "qwen")
    assert parsing.parser("<|user|>a<|assistant|><think>\n", None)().reasons
    assert not parsing.parser("<|user|><think><|assistant|>", None)().reasons


@pytest.mark.skipif(not can_parse_responses(), reason="this transformers has no response templates")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a<c>{"name": "f", "arguments": {"x": 1}}</c>', Message("a", "", [Call("f", '{"x": 1}')])),
        ('hm</t> b<c>{"name": }</c>c', Message('b<c>{"name": }</c>c', "hm")),
        ("hm</t><c>1</c>", Message("<c>1</c>", "hm")),
        ('<c>{"name": "f"', Message('<c>{"name": "f"')),
        ('<c>{"name": "f"}', Message("", "", [Call("f", "{}")])),
    ],
)
def test_templates_of_transformers(text: str, expected: Message) -> None:
    tokenizer = SimpleNamespace(response_template=TEMPLATE, chat_template="<tool_call>")
    parsing = reply_parsing(tokenizer, None)
    assert parsing.template is TEMPLATE
    assert parsing.marks(False) is None
    prompt = "assistant:<t>" if expected.reasoning else "assistant:"
    parser = parsing.parser(prompt, {"f": {}})()
    assert parser.reasons == bool(expected.reasoning)
    made = Message()
    made.add([*parser.feed(text), *parser.finish()])
    assert made == expected
    assert reply_parsing(tokenizer, None, "qwen").template is None
