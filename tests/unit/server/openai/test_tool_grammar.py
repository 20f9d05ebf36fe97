"""Rules of replies that call tools, in the forms of all families that have them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from retrieval_draft.drafting.grammar.grammar import Grammar
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.structured_outputs import AskedGrammar
from retrieval_draft.server.openai.tool_grammar import tool_grammar
from retrieval_draft.server.openai.tools import ToolFunction, ToolUse
from retrieval_draft.server.parsing.choice import REASONING_PARSERS, ReplyParsing
from retrieval_draft.server.parsing.deltas import Message
from tests.support.scripted import byte_tokenizer

pytest.importorskip("llguidance")
from retrieval_draft.drafting.grammar.compiler import compiler_of

MARKS = {
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>"),
}
NODE = {
    "type": "object",
    "properties": {"path": {"$ref": "#/$defs/p"}, "n": {"type": "integer"}},
    "required": ["path", "n"],
    "additionalProperties": False,
    "$defs": {"p": {"enum": ["a", "é"]}},
}
ARGUMENTS = '{"path": "é", "n": 3}'
CALLS = {
    "qwen": '<tool_call>\n{"name": "f", "arguments": ARGS}\n</tool_call>',
    "llama3": '{"name": "f", "parameters": ARGS}',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": ARGS}]',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>ARGS"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "gpt-oss": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>ARGS",
}
TWO = {
    "qwen": CALLS["qwen"] + "\n" + CALLS["qwen"],
    "llama3": CALLS["llama3"] + "; " + CALLS["llama3"],
    "mistral": CALLS["mistral"][:-1] + ", " + CALLS["mistral"][len("[TOOL_CALLS][") :],
}
PLAIN = {
    "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi {"
}
FUNCTIONS = [ToolFunction("f", parameters=NODE, strict=True), ToolFunction("g")]


def accepts(
    family: str,
    use: ToolUse,
    *texts: str,
    prompt: str = "",
    reasoning: bool = False,
    other: AskedGrammar | None = None,
) -> list[bool]:
    """True for each text that the rule of a reply allows as the whole of it."""
    tokenizer = byte_tokenizer(specials=("<|turn|>", *MARKS.get(family, ())))
    name = family if family in REASONING_PARSERS else "qwen"
    parsing = ReplyParsing(family, name if reasoning else None)
    asked = tool_grammar(use, parsing, prompt, tokenizer, other)
    assert asked is not None
    compiled = compiler_of(tokenizer, [0], len(tokenizer)).compile(asked.grammar)
    found = []
    for text in texts:
        ids, matcher = [*tokenizer(text)["input_ids"], 0], compiled._made()
        left = len(ids) - matcher.try_consume_tokens(ids)
        found.append(left == 0 or (left == 1 and matcher.is_stopped()))
    return found


@pytest.mark.parametrize("family", [*CALLS])
def test_a_call_is_required(family: str) -> None:
    call = CALLS[family].replace("ARGS", ARGUMENTS)
    use = ToolUse(FUNCTIONS, "required")
    wrong = [
        CALLS[family].replace("ARGS", "{}"),
        call.replace('"f"', '"h"').replace("f<", "h<").replace(".f ", ".h "),
    ]
    assert accepts(family, use, call, *wrong, "text", "") == [True, False, False, False, False]
    named = ToolUse(FUNCTIONS[1:], "function", True)
    other = call.replace('"f"', '"g"').replace("f<", "g<").replace(".f ", ".g ").replace(ARGUMENTS, "{}")
    assert accepts(family, named, other, call) == [True, False]
    parser = ReplyParsing(family).parser("", use.schemas)()
    message = Message()
    message.add([*parser.feed(call), *parser.finish()])
    assert [json.loads(each.arguments) for each in message.calls] == [json.loads(ARGUMENTS)]
    if family in TWO:
        two = TWO[family].replace("ARGS", ARGUMENTS)
        assert accepts(family, use, two) == [True]
        assert accepts(family, ToolUse(FUNCTIONS, "required", True), two) == [False]


@pytest.mark.parametrize("family", [*CALLS])
def test_calls_of_strict_tools_follow_their_schema_among_other_text(family: str) -> None:
    call, wrong = (CALLS[family].replace("ARGS", each) for each in (ARGUMENTS, "{}"))
    free = wrong.replace('"f"', '"g"').replace("f<", "g<").replace(".f ", ".g ")
    before = "" if family in ("llama3", "gpt-oss") else "Text {é}. <"
    use = ToolUse(FUNCTIONS)
    texts = [PLAIN.get(family, "Plain <text."), before + call, before + free, before + wrong]
    assert accepts(family, use, *texts) == [True, True, True, False]
    assert tool_grammar(ToolUse(FUNCTIONS[1:]), ReplyParsing(family), "", byte_tokenizer()) is None


@pytest.mark.parametrize("family", [*CALLS])
@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar.json_schema({"enum": [7, "é"]}), '"é"'),
        (Grammar.regex("a+ b"), "aa b"),
        (Grammar.choice(["yes", "no"]), "no"),
        (Grammar.json_object().within("<", ">"), '<{"b": 1}>'),
    ],
)
def test_a_reply_calls_tools_or_follows_another_grammar(family: str, grammar: Grammar, text: str) -> None:
    call, wrong = (CALLS[family].replace("ARGS", each) for each in (ARGUMENTS, "{}"))
    other = AskedGrammar(grammar, "response_format")
    texts = [call, text, wrong, "Plain text.", f"{text}{call}"]
    assert accepts(family, ToolUse(FUNCTIONS), *texts, other=other) == [True, True, False, False, False]
    free = ToolUse([ToolFunction("f")])
    assert accepts(family, free, call, wrong, text, other=other) == [True, True, True]
    required = ToolUse(FUNCTIONS, "required")
    assert accepts(family, required, call, text, other=other) == [True, False]


def test_reasoning_comes_before() -> None:
    use = ToolUse(FUNCTIONS, "required")
    call = CALLS["qwen"].replace("ARGS", ARGUMENTS)
    texts = [call, f"<think>\nHm <tool_call>.\n</think>\n\n{call}", f"Hm.</think>\n{call}"]
    assert accepts("qwen", use, *texts, reasoning=True) == [True, True, False]
    begun: Any = {"prompt": "<|turn|><think>\n", "reasoning": True}
    assert accepts("qwen", use, *texts, **begun) == [False, True, True]


def test_families_without_a_rule_are_refused() -> None:
    for use, field in ((ToolUse(FUNCTIONS, "required"), "tool_choice"), (ToolUse(FUNCTIONS), "tools")):
        with pytest.raises(ApiError, match="not supported") as raised:
            tool_grammar(use, ReplyParsing("gemma"), "", byte_tokenizer())
        assert raised.value.param == field
    other = AskedGrammar(Grammar.json_object(), "response_format")
    with pytest.raises(ApiError, match=r"response_format: .* not supported"):
        tool_grammar(ToolUse(FUNCTIONS[1:]), ReplyParsing("gemma"), "", byte_tokenizer(), other)
    long = ToolFunction("f", parameters={"description": "x" * (1 << 18)}, strict=True)
    with pytest.raises(ApiError, match="characters") as raised:
        tool_grammar(ToolUse([long]), ReplyParsing("qwen"), "", byte_tokenizer())
    assert raised.value.param == "tools"
