"""Grammars of replies that call tools: a call that is required, and arguments that follow a strict schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrieval_draft.drafting.grammar.grammar import Grammar
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import special_tokens
from retrieval_draft.server.openai.structured_outputs import AskedGrammar
from retrieval_draft.server.openai.tools import ToolFunction, ToolUse
from retrieval_draft.server.parsing.choice import ReplyParsing
from retrieval_draft.server.parsing.reader import Tags

__all__ = ["tool_grammar"]


@dataclass(frozen=True, slots=True)
class _Form:
    """Texts around calls as a family writes them.

    Attributes:
        mark: First text of all calls, which no other text has.
        begin: After it, in front of the calls.
        call: In front of the arguments of one, where ``NAME`` stands for its name.
        after: After them.
        between: Between two; None where a reply has one at most.
        end: After all calls.
        plain: Rule of replies without calls, where there is no mark.
        parts: Rule of the text in front of the calls.
    """

    mark: str = ""
    begin: str = ""
    call: str = ""
    after: str = ""
    between: str | None = ""
    end: str = ""
    plain: str | None = None
    parts: str = ""


_OBJECT = '{"name": "NAME", "arguments": '
_QWEN = _Form("<tool_call>", "\n", _OBJECT, "}\n</tool_call>", "\n<tool_call>\n")
_PART = "{<|channel|>} ({analysis} | {commentary}) {<|message|>} TEXT {<|end|><|start|>assistant}"
_FORMS = {
    "hermes": _QWEN,
    "qwen": _QWEN,
    "llama3": _Form(
        call='{"name": "NAME", "parameters": ', after="}", between="; ", plain=r"/(\s*[^{\s](?s:.*))?/"
    ),
    "mistral": _Form("[TOOL_CALLS]", "[", _OBJECT, "}", ", ", "]"),
    "deepseek": _Form(
        "<｜tool▁calls▁begin｜>",
        call="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        after="<｜tool▁call▁end｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    "gpt-oss": _Form(
        call="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        between=None,
        plain="{<|channel|>final<|message|>} TEXT",
        parts=f"({_PART})*",
    ),
}
_TEXT = "/(?s:.*)/"


def tool_grammar(
    use: ToolUse, parsing: ReplyParsing, prompt: str, tokenizer: Any, other: AskedGrammar | None = None
) -> AskedGrammar | None:
    """The grammar of a reply that calls tools; None where any text is one.

    Args:
        use: The tools.
        parsing: Of the model's replies.
        prompt: Text before the reply, which may end within reasoning.
        tokenizer: The model's.
        other: Grammar of replies without calls, where they are allowed; None for any text.

    Raises:
        ApiError: Calls of this form have no grammar, or a schema is none.
    """
    is_auto = use.choice == "auto"
    if is_auto and other is None and not any(function.strict for function in use.functions):
        return None
    other = other if is_auto else None
    field = "tools" if is_auto else "tool_choice"
    form = _FORMS.get(parsing.tool_parser or "")
    if form is None:
        what = "strict" if is_auto else "a call that is required"
        if other is not None:
            field, what = other.field, "a choice between calls and text by a grammar"
        raise ApiError(
            400, f"{field}: {what} is not supported in the form in which this model writes calls.", field
        )
    writer = _Writer(form, {text: token for token, text in special_tokens(tokenizer).items()})
    try:
        rules = writer.calls(use)
        if other is not None:
            rules["start"] = writer.or_other()
        else:
            rules |= writer.auto() if is_auto else writer.required(parsing.tags, parsing.begun(prompt))
        source = "\n".join(f"{name}: {body}" for name, body in rules.items())
        if other is not None:
            return AskedGrammar(Grammar("tools", source, other=other.grammar), other.field)
        return AskedGrammar(Grammar("tools", source), field)
    except RetrievalDraftError as error:
        raise ApiError(400, f"{field}: {error.message}", field) from error


class _Writer:
    """Writes rules in llguidance's Lark syntax.

    Args:
        form: Of the calls.
        special: Ids of special tokens by text.
    """

    def __init__(self, form: _Form, special: Mapping[str, int]) -> None:
        self._form, self._special = form, special
        self._marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def calls(self, use: ToolUse) -> dict[str, str]:
        """The rules of all calls, the rule ``calls`` among them, which the mark stands in front of."""
        form, say = self._form, self._literal
        more = (
            "" if use.one_call or form.between is None else f"({say(form.between)} call {say(form.after)})*"
        )
        rules = {
            "calls": f"{say(form.begin)} call {say(form.after)} {more} {say(form.end)}",
            "call": " | ".join(f"call_{index}" for index in range(len(use.functions))),
            "TEXT": _TEXT,
        }
        for index, function in enumerate(use.functions):
            schema = _schema(function, use.choice == "auto")
            begin = say(form.call.replace("NAME", function.name))
            source = Grammar.json_schema(schema, strict=bool(function.strict)).source
            rules[f"call_{index}"] = f"{begin} %json {source}"
        return rules

    def required(self, tags: Tags | None, begun: bool) -> dict[str, str]:
        """The rule ``start`` of a reply that calls tools, after reasoning at most."""
        start = f"{self._quoted(self._form.parts)} {self._literal(self._form.mark)} calls"
        if tags is None:
            return {"start": start}
        think = f"{self._up_to(tags.end)} SPACE"
        return {
            "start": f"{think} {start}" if begun else f"({self._literal(tags.begin)} {think})? {start}",
            "SPACE": r"/\s{0,4}/",
            **self._rule_up_to(tags.end),
        }

    def or_other(self) -> str:
        """The rule ``start`` of a reply that either calls tools or follows the grammar ``@other``."""
        return f"{self._quoted(self._form.parts)} {self._literal(self._form.mark)} calls | @other"

    def auto(self) -> dict[str, str]:
        """The rule ``start`` of any reply whose calls, if it has some, follow the rules."""
        form = self._form
        if form.plain is not None:
            return {"start": f"{self._quoted(form.parts)} (calls | plain)", "plain": self._quoted(form.plain)}
        if form.mark in self._special:
            return {"start": f"TEXT ({self._literal(form.mark)} calls TEXT)?"}
        return {
            "start": "(up_to calls)? rest",
            "rest": "REST",
            "REST": f"{_TEXT} & ~/(?s:.*){_escaped(form.mark)}(?s:.*)/",
            **self._rule_up_to(form.mark),
        }

    def _up_to(self, mark: str) -> str:
        return f"TEXT {self._literal(mark)}" if mark in self._special else "up_to"

    def _rule_up_to(self, mark: str) -> dict[str, str]:
        return {} if mark in self._special else {f"up_to[suffix={json.dumps(mark)}]": _TEXT}

    def _quoted(self, rule: str) -> str:
        """A rule with texts in braces, which are quoted."""
        if rule.startswith("/"):
            return rule
        return re.sub(r"\{(.*?)\}", lambda found: self._literal(found[1]), rule)

    def _literal(self, text: str) -> str:
        """A text, its special tokens as such."""
        parts, position = [], 0
        for found in self._marks.finditer(text):
            parts += [text[position : found.start()], self._special[found[0]]]
            position = found.end()
        parts.append(text[position:])
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part != ""
        )


def _schema(function: ToolFunction, is_auto: bool) -> dict[str, Any]:
    """Of the arguments: any object where nothing is asked for, none where there are no parameters."""
    if is_auto and not function.strict:
        return {"type": "object"}
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    return dict(function.parameters) if function.parameters else empty


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() or char in "_<>" else f"\\{char}" for char in text)
