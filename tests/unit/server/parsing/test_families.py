"""Calls in the forms of families of models, by example."""

from __future__ import annotations

from typing import Any

import pytest

from retrieval_draft.server.parsing.choice import REASONING_PARSERS, ReplyParsing
from retrieval_draft.server.parsing.deltas import Call, Message

TOOLS: Any = {
    "f": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": ["null", "array"]}},
    "g": {},
}
F, G = Call("f", '{"a": 1}'), Call("g", "{}")


def parsed(name: str, text: str, tools: Any = TOOLS, **more: Any) -> Message:
    parser = ReplyParsing(name, name if name in REASONING_PARSERS else None).parser("", tools, **more)()
    made = Message()
    made.add([*parser.feed(text), *parser.finish()])
    return made


@pytest.mark.parametrize(
    ("name", "text", "content", "reasoning", "calls"),
    [
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "", "", [F]),
        ("qwen", '<think>\nhm\n</think>\n\nok\n<tool_call>{"name": "g"}</tool_call>', "ok", "hm", [G]),
        ("qwen", '<tool_call>{"name": "g"}{"arguments": "{}", "name": "g"}</tool_call>', "", "", [G, G]),
        (
            "qwen",
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
            "<parameter=b>\n x\n\"1\"\n</parameter>\n"
            "<parameter=c>\nNone\n</parameter>\n<parameter=d>2</parameter></function>\n</tool_call>",
            "",
            "",
            [Call("f", '{"a": 1, "b": " x\\n\\"1\\"", "c": null, "d": "2"}')],
        ),
        ("qwen", "<tool_call><function=g></function></tool_call>", "", "", [G]),
        ("qwen", '<tool_call>{"name": "f", "arguments": null} rest', "rest", "", [Call("f", "{}")]),
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1}, oops}', "oops}", "", [F]),
        ("qwen", '<tool_call>oops<tool_call>{"name": "g"}</tool_call>', "<tool_call>oops", "", [G]),
        ("qwen", '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', "", []),
        ("qwen", "a <think>b</think>", "a <think>b</think>", "", []),
        ("llama3", ' {"name": "f", "parameters": {"a": 1}}; {"name": "g"}', "", "", [F, G]),
        ("llama3", '<|python_tag|>{"name": "h", "parameters": {}}', "", "", [Call("h", "{}")]),
        ("llama3", '{"name": "Bob", "age": 1} hi', '{"name": "Bob", "age": 1} hi', "", []),
        ("llama3", '{"answer": {"name": "f"}}', '{"answer": {"name": "f"}}', "", []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', "", "", [F, G]),
        (
            "mistral",
            '[THINK]x[/THINK]y[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[CALL_ID]1[ARGS]{}',
            "y",
            "x",
            [F, G],
        ),
        ("mistral", "[TOOL_CALLS] no, call", "[TOOL_CALLS] no, call", "", []),
        (
            "gemma",
            '<|channel>thought\nhm<channel|>x<|tool_call>call:f{a:1,b:<|"|>te"x\n<|"|>,'
            "c:[{d:True},-1,x]}<tool_call|>",
            "x",
            "hm",
            [Call("f", '{"a":1,"b":"te\\"x\\n","c":[{"d":true},-1,"x"]}')],
        ),
        (
            "gemma",
            "<start_function_call>call:f{b:<escape>{x}<escape>}<end_function_call>",
            "",
            "",
            [Call("f", '{"b":"{x}"}')],
        ),
        ("gemma", "<|tool_call>f{}", "<|tool_call>f{}", "", []),
        (
            "deepseek",
            "<think>a</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
            '```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
            "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>",
            "",
            "a",
            [F, G],
        ),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a": 1}<|call|>',
            "",
            "Hm.",
            [F],
        ),
        (
            "gpt-oss",
            ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
            "<|start|>assistant<|channel|>final<|message|>Done<|return|>",
            "Done",
            "",
            [F],
        ),
        ("gpt-oss", "plain <text", "plain <text", "", []),
        ("gpt-oss", "<|channel|>commentary to=functions.g<|message|>", "", "", [G]),
    ],
)  # fmt: skip
def test_replies(name: str, text: str, content: str, reasoning: str, calls: list[Call]) -> None:
    assert parsed(name, text) == Message(content, reasoning, calls)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": [1, "x', '{"a": [1, "x'),
        ("<tool_call><function=f><parameter=b>xy</para", '{"b": "xy</para'),
    ],
)
def test_a_call_that_is_cut_has_the_arguments_so_far(text: str, arguments: str) -> None:
    assert parsed("qwen", text).calls == [Call("f", arguments)]


def test_calls_are_text_where_no_tools_are_offered() -> None:
    text = '<tool_call>{"name": "g"}</tool_call>'
    assert parsed("qwen", text, None) == Message(text)
    assert parsed("gpt-oss", "<|channel|>analysis<|message|>a<|end|>", None).reasoning == "a"


def test_only_the_first_call_where_one_is_wanted() -> None:
    text = '<tool_call>{"name": "g"}</tool_call>' * 2 + "x"
    assert parsed("qwen", text, one_call=True) == Message("x", "", [G])


def test_time_is_linear_in_broken_calls() -> None:
    from time import perf_counter

    begin = perf_counter()
    parsed("qwen", '<tool_call>{"a":[' * 4000 + "]" * 4000 + "x")
    assert perf_counter() - begin < 5
