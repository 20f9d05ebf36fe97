"""Any cut of a reply into pieces yields the same message, whatever it holds, for every parser."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.engine.compat import can_parse_responses
from retrieval_draft.server.parsing.choice import REASONING_PARSERS, TOOL_PARSERS, ReplyParsing
from retrieval_draft.server.parsing.deltas import Delta, Message

TOOLS = {"f": {"a": {"type": "integer"}, "b": {"type": "string"}}, "get.g-1": {}}
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|eot_id\|>)", "content": "text"},
    },
}
PARSINGS = {
    name: ReplyParsing(name, name if name in REASONING_PARSERS else "qwen")
    for name in TOOL_PARSERS
} | {"reasoning only": ReplyParsing(None, "qwen")}  # fmt: skip
if can_parse_responses():
    PARSINGS["template"] = ReplyParsing(template=TEMPLATE)
NAMES = [*PARSINGS]

WHOLE = {
    "hermes": '<tool_call>\n{"name": NAME, "arguments": VALUE}\n</tool_call>',
    "qwen": '<tool_call>{"arguments": VALUE, "name": NAME}</tool_call>\n',
    "llama3": '{"name": NAME, "parameters": VALUE}; ',
    "mistral": "[TOOL_CALLS]BARE[ARGS]VALUE",
    "deepseek": "<｜tool▁call▁begin｜>BARE<｜tool▁sep｜>VALUE<｜tool▁call▁end｜>",
    "gpt-oss": "<|start|>assistant<|channel|>commentary to=functions.BARE <|message|>VALUE<|call|>",
    "template": '<tool_call>{"name": NAME, "arguments": VALUE}</tool_call>',
}
PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=",
    "</function>", "<parameter=a>", "<parameter=b>", "</parameter>", "<|python_tag|>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<|tool_call>", "<tool_call|>",
    "call:f{", "call:", '<|"|>', "<escape>", "<start_function_call>", "<end_function_call>",
    "<|channel>thought\n", "<channel|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "function", "```json\n", "<|channel|>", "<|message|>",
    "<|start|>", "<|end|>", "<|call|>", "<|constrain|>", "analysis", "final",
    "commentary to=functions.f ", " to=functions.f", '{"name": "f"', '"arguments": {',
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "get.g-1", "parameters": {}}', "{", "}", "[",
    "]", '"', "\\", ":", ",", ";", " ", "\n", "a", "f", "1", "<", ">", "é", "🎈", "null",
    "<|im_end|>", "\x00", "\ud800",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=24).map("".join)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(PIECES[:-1]) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def deltas(name: str, pieces: list[str], prompt: str = "") -> list[Delta]:
    """All deltas of a reply, neighbours of the same kind joined."""
    tools = None if name == "reasoning only" else TOOLS
    parser = PARSINGS[name].parser(prompt, tools)()
    found: list[Delta] = []
    for each in [*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()]:
        assert each.text
        if found and each.kind != "name" and (found[-1].kind, found[-1].call) == (each.kind, each.call):
            found[-1] = Delta(each.kind, found[-1].text + each.text, each.call)
        else:
            found.append(each)
    return found


def message(found: list[Delta]) -> Message:
    made = Message()
    made.add(found)
    return made


def cut(text: str, ends: list[int]) -> list[str]:
    at = sorted({min(end, len(text)) for end in ends} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(at)]


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS, ends=st.lists(st.integers(0, 200), max_size=12), thinks=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_cut_yields_the_same_message(name: str, text: str, ends: list[int], thinks: bool) -> None:
    prompt = "<|im_start|>assistant\n<think>\n" if thinks else ""
    found = deltas(name, [text], prompt)
    assert deltas(name, cut(text, ends), prompt) == found
    assert deltas(name, list(text), prompt) == found
    calls = [delta for delta in found if delta.kind == "name"]
    assert [delta.call for delta in calls] == list(range(len(calls)))


@pytest.mark.parametrize("name", [*WHOLE])
@given(
    calls=st.lists(
        st.tuples(st.sampled_from([*TOOLS]), st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
        min_size=1, max_size=3,
    ),
    ends=st.lists(st.integers(0, 300), max_size=12),
    ascii=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_calls_come_back_as_they_were_written(
    name: str, calls: list[tuple[str, Any]], ends: list[int], ascii: bool
) -> None:
    if name not in PARSINGS:
        pytest.skip("this transformers has no response templates")
    if name == "template":  # it ends at the mark, in text too; as an object without keys it is an empty field
        calls = [(tool, {"a": 1, "b": {"c": ["}", "é\\"]}}) for tool, _ in calls]
    if name == "gpt-oss":
        calls = [(tool, {"a": [tool, "{}", "é\n"]}) for tool, _ in calls]
    written = [
        WHOLE[name]
        .replace("NAME", json.dumps(tool))
        .replace("BARE", tool)
        .replace("VALUE", json.dumps(arguments, ensure_ascii=ascii))
        for tool, arguments in calls
    ]
    made = message(deltas(name, cut("".join(written), ends)))
    assert [(call.name, json.loads(call.arguments)) for call in made.calls] == calls
    assert (made.content, made.reasoning) == ("", "")


@given(text=TEXTS)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_text_without_tools_stays_as_it_is(text: str) -> None:
    parser = ReplyParsing("qwen", None).parser("", None)()
    found = [*parser.feed(text), *parser.finish()]
    assert message(found).content == text
