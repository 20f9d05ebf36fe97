"""Forms in which families of models write calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from retrieval_draft.server.parsing.reader import BrokenCallError, EndOfReply, Reader, Reads, types_of

__all__ = ["DeepSeekReader", "GemmaReader", "HarmonyReader", "LlamaReader", "MistralReader", "QwenReader"]

_NAME = re.compile(r"[\w.:/-]+")
_RECIPIENT = re.compile(r"to=functions\.([\w.:/-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_WORDS = {"True": "true", "False": "false", "None": "null"}


class QwenReader(Reader):
    """Hermes, Qwen and others: JSON, or a function with parameters in the form of XML, between two tags.

    Example:
        <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
        <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
    """

    opens = ("<tool_call>",)
    closes = ("</tool_call>",)

    def call(self, mark: str) -> Reads[None]:
        """Parses one call, or several objects between the same tags."""
        char = yield from self.solid()
        if char == "<":
            yield from self.literal("function=")
            yield from self._function()
            return
        self.back(char)
        while True:
            yield from self.call_object()
            char = yield from self.solid()
            self.back(char)
            if char != "{":
                return
            self.begin_attempt()

    def _function(self) -> Reads[None]:
        name = (yield from self.text_until(">")).strip()
        self.begin_call(name)
        schemas = (self.tools or {}).get(name, {})
        put, between = self.out.arguments, "{"
        while True:
            tag = yield from self.until(("<parameter=", "</function>", "</tool_call>"), _ignore)
            if tag != "<parameter=":
                put("{}" if between == "{" else "}")
                return
            key = (yield from self.text_until(">")).strip()
            put(f"{between}{_quoted(key)}: ")
            between = ", "
            types = types_of(schemas.get(key))
            if types in ((), ("string",)):
                put('"')
                yield from self.until(("</parameter>",), _Lines(lambda text: put(_quoted(text)[1:-1])))
                put('"')
            else:
                put(_typed((yield from self.text_until("</parameter>")).strip("\n"), types))


class LlamaReader(Reader):
    """Llama 3: the reply is one object or several, after a mark or without one.

    Example:
        {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
    """

    opens = ("<|python_tag|>",)

    def start(self) -> Reads[None]:
        """Parses a reply that begins with an object; without a mark it calls known tools only."""
        self._tape = ""
        try:
            char = yield from self.solid()
        except EndOfReply:
            self.out.content(self._tape)
            raise
        before, self._tape = self._tape[:-1], None
        self.out.content(before)
        self._ahead.append(char)
        if char == "{":
            yield from self.attempt("", self._objects(True))

    def call(self, mark: str) -> Reads[None]:
        """Parses the objects after a mark."""
        yield from self._objects(False)(mark)

    def _objects(self, known: bool) -> Callable[[str], Reads[None]]:
        def read(mark: str) -> Reads[None]:
            while True:
                yield from self.call_object(known)
                char = yield from self.solid()
                if char != ";":
                    self.back(char)
                    if char != "{":
                        return
                self.begin_attempt()

        return read


class MistralReader(Reader):
    """Mistral: a list of objects after a mark, or a mark, a name and arguments for each.

    Example:
        [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]
        [TOOL_CALLS]f[ARGS]{"a": 1}
    """

    opens = ("[TOOL_CALLS]",)
    inner = ("[ARGS]", "[CALL_ID]")

    def call(self, mark: str) -> Reads[None]:
        """Parses one call, or a list of them."""
        char = yield from self.solid()
        if char == "[":
            while True:
                yield from self.call_object()
                char = yield from self.solid()
                if char == "]":
                    return
                self.begin_attempt()
                if char != ",":
                    self.back(char)
                    raise BrokenCallError
        name = ""
        while _NAME.fullmatch(char):
            name += char
            char = yield from self.char()
        self.back(char)
        if char != "{":
            self.back((yield from self.solid()))
            mark = yield from self._mark()
            if mark == "[CALL_ID]":
                yield from self.text_until("[ARGS]")
        self.begin_call(name)
        yield from self.argument_value()

    def _mark(self) -> Reads[str]:
        held = ""
        while held not in self.inner:
            held += yield from self.char()
            if not any(mark.startswith(held) for mark in self.inner):
                raise BrokenCallError
        return held


class GemmaReader(Reader):
    """Gemma 4 and FunctionGemma: a name and arguments with bare keys, strings between marks.

    Example:
        <|tool_call>call:f{a:1,b:<|"|>text<|"|>}<tool_call|>
        <start_function_call>call:f{b:<escape>text<escape>}<end_function_call>
    """

    opens = ("<|tool_call>", "<start_function_call>")
    closes = ("<tool_call|>", "<end_function_call>")
    inner = ('<|"|>', "<escape>")

    def call(self, mark: str) -> Reads[None]:
        """Parses one call."""
        self.back((yield from self.solid()))
        yield from self.literal("call:")
        name = (yield from self.text_until("{")).strip()
        if not _NAME.fullmatch(name):
            raise BrokenCallError
        self.begin_call(name)
        self.out.arguments("{")
        yield from self._members(self.inner[self.opens.index(mark)])

    def _members(self, quote: str) -> Reads[None]:
        put, depth = self.out.arguments, 1
        while depth:
            char = yield from self.char()
            if char == '"':
                yield from self._string(put)
            elif char == quote[0]:
                yield from self.literal(quote[1:])
                put('"')
                yield from self.until((quote,), lambda text: put(_quoted(text)[1:-1]))
                put('"')
            elif char in "{}[],:" or char.isspace():
                depth += (char in "{[") - (char in "}]")
                put(char)
            else:
                word = ""
                while char not in "{}[],:\"'" and char != quote[0] and not char.isspace():
                    word += char
                    char = yield from self.char()
                self.back(char)
                if not word:
                    raise BrokenCallError
                put(_quoted(word) if char == ":" else _bare(word))


class DeepSeekReader(Reader):
    """DeepSeek V3, V3.1 and R1: each call between marks, its name before or after a separator."""

    opens = ("<｜tool▁call▁begin｜>",)
    closes = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>")
    begins_calls = closes[:1]
    inner = ("<｜tool▁sep｜>",)

    def call(self, mark: str) -> Reads[None]:
        """Parses one call."""
        name = (yield from self.text_until(*self.inner)).strip()
        is_fenced = name == "function"
        if is_fenced:
            name = (yield from self.text_until("\n")).strip()
        if not _NAME.fullmatch(name):
            raise BrokenCallError
        self.begin_call(name)
        char = yield from self.solid()
        if char == "`":
            yield from self.text_until("\n")
        else:
            self.back(char)
        yield from self.argument_value()
        while (char := (yield from self.solid())) == "`":
            pass
        self.back(char)


class HarmonyReader(Reader):
    """gpt-oss: every part has a header with its channel, and calls one with their recipient.

    Example:
        <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f
        <|constrain|>json<|message|>{"a": 1}<|call|>
    """

    inner = (
        "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"
    )  # fmt: skip

    def run(self) -> Reads[None]:
        """Parses a reply."""
        mark, head = yield from self._first()
        while True:
            while mark in ("<|start|>", "<|channel|>", "<|constrain|>"):
                head += mark
                parts: list[str] = []
                mark = yield from self.until(self.inner, parts.append)
                head += "".join(parts)
            call, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
            head = ""
            if mark != "<|message|>":
                mark = yield from self.until(self.inner, _ignore)
            elif call and self.tools is not None:
                mark = yield from self._called(call[1])
            else:
                self.reasons = channel is not None and channel[1] == "analysis"
                put = self.out.reasoning if self.reasons else self.out.content
                mark = yield from self.until(self.inner, put)
                self.reasons = False

    def _first(self) -> Reads[tuple[str, str]]:
        """The first mark, and the part of a header before it; other text before it is content."""
        head = ""
        try:
            while True:
                head += yield from self.char()
                text = head.lstrip()
                if text in self.inner:
                    return text, ""
                if text.startswith("to="):
                    parts: list[str] = []
                    try:
                        mark = yield from self.until(self.inner, parts.append)
                    finally:
                        head += "".join(parts)
                    return mark, head
                if text and not any(mark.startswith(text) for mark in (*self.inner, "to=")):
                    break
        except EndOfReply:
            self.out.content(head)
            raise
        self._ahead += reversed(head)
        return (yield from self.until(self.inner, self.out.content)), ""

    def _called(self, name: str) -> Reads[str]:
        self.begin_call(name)
        is_empty = True

        def put(text: str) -> None:
            nonlocal is_empty
            is_empty = False
            self.out.arguments(text)

        try:
            return (yield from self.until(self.inner, put))
        finally:
            if is_empty:
                self.out.arguments("{}")


class _Lines:
    """Drops one line break at each end of a text that is emitted piece by piece."""

    def __init__(self, emit: Callable[[str], object]) -> None:
        self._emit, self._held, self._begun = emit, "", False

    def __call__(self, text: str) -> None:
        for char in text:
            if self._held:
                self._emit(self._held)
                self._held = ""
            if char != "\n":
                self._emit(char)
            elif self._begun:
                self._held = char
            self._begun = True


def _ignore(text: str) -> None:
    """Text between parts of a reply."""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _bare(word: str) -> str:
    """A word without quotes as JSON."""
    word = _WORDS.get(word, word)
    try:
        _read(word)
    except (ValueError, RecursionError):
        return _quoted(word)
    return word


def _typed(text: str, types: tuple[str, ...]) -> str:
    """Text as JSON of the first of some types that it has; as a string if it has none."""
    plain = text.strip()
    plain = _WORDS.get(plain, plain)
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = _read(plain)
    for each in types:
        if each == "string":
            break
        if each == "null" and plain == "null":
            return plain
        if each == "boolean" and isinstance(value, bool):
            return plain
        if each in ("integer", "number") and isinstance(value, int | float) and not isinstance(value, bool):
            return plain
        if (each, type(value)) in (("object", dict), ("array", list)):
            return plain
    return _quoted(text)


def _read(text: str) -> Any:
    """JSON, without the numbers that Python alone knows."""
    return json.loads(text, parse_constant=int)  # which refuses them
