"""A parser that reads a reply character by character, so that no cut of the text can matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from retrieval_draft.server.parsing.deltas import Delta, DeltaWriter

__all__ = ["BrokenCallError", "EndOfReply", "Reader", "Reads", "Tags", "Tools", "types_of"]

T = TypeVar("T")
Reads = Generator[None, str, T]
"""A part of a parser: it is sent one character at a time, and returns T."""

Tools = Mapping[str, Mapping[str, Any]]
"""JSON schemas of the parameters by name, of each tool by name."""

_RESCANNED = 256
"""Characters of a broken call that are searched for another one: a limit, so that time stays linear."""


class EndOfReply(Exception):
    """The end of the text, raised in place of its next character."""


class BrokenCallError(Exception):
    """Text that is no call."""


@dataclass(frozen=True, slots=True)
class Tags:
    """Marks around reasoning.

    Attributes:
        begin: In front of it.
        end: After it.
        anywhere: Whether it may begin after other text.
    """

    begin: str
    end: str
    anywhere: bool = False


class Reader:
    """Base of the parsers of model families.

    Text that turns out to be no call before its name is known stays content, marks and all. From the name on
    a call is a call, and its arguments are what the model wrote.

    Args:
        tools: The request's tools; None where calls are left as text.
        tags: Marks around reasoning; None for no reasoning.
        begun: Whether the prompt ends within reasoning.
        one_call: Whether calls after the first are dropped.
    """

    opens: tuple[str, ...] = ()
    """Marks in front of calls."""
    closes: tuple[str, ...] = ()
    """Marks around or after calls, which are no content."""
    begins_calls: tuple[str, ...] = ()
    """Those of them that stand in front of all calls."""
    inner: tuple[str, ...] = ()
    """Marks within calls."""

    def __init__(
        self, tools: Tools | None, tags: Tags | None = None, begun: bool = False, one_call: bool = False
    ) -> None:
        self.tools, self._tags, self._begun = tools, tags, begun
        self.out = DeltaWriter(one_call)
        self.reasons = begun and tags is not None
        self._ahead: list[str] = []
        self._last = ""
        self._tape: str | None = None
        self._parts = self.run()
        with suppress(StopIteration):
            next(self._parts)

    def feed(self, text: str) -> list[Delta]:
        """Parses more text."""
        for char in text:
            self._parts.send(char)
        return self.out.take()

    def finish(self) -> list[Delta]:
        """Parses the end."""
        with suppress(StopIteration, EndOfReply):
            self._parts.throw(EndOfReply())
        return self.out.end()

    def run(self) -> Reads[None]:
        """Parses a reply; ends by `EndOfReply` only."""
        tags = self._tags
        if tags is not None and (self._begun or (yield from self._begins(tags.begin))):
            yield from self._reasoning(tags)
        if self.tools is not None:
            yield from self.start()
        watched = (*self.opens, *self.closes) if self.tools is not None else ()
        if tags is not None and tags.anywhere:
            watched = (*watched, tags.begin)
        while True:
            mark = yield from self.until(watched, self.out.content)
            if mark in self.opens:
                yield from self.attempt(mark, self.call)
            elif tags is not None and mark == tags.begin:
                yield from self._reasoning(tags)
            elif not self.out.has_calls and mark not in self.begins_calls:
                self.out.content(mark)  # of no call

    def start(self) -> Reads[None]:
        """Parses calls that begin a reply without a mark."""
        yield from ()

    def call(self, mark: str) -> Reads[None]:
        """Parses a call after its mark; a reader without marks knows none.

        Raises:
            BrokenCallError: It is none.
        """
        yield from ()
        raise BrokenCallError

    def attempt(self, mark: str, call: Callable[[str], Reads[None]]) -> Reads[None]:
        """Parses a call; if it is none, its text becomes content."""
        self._tape = mark
        try:
            yield from call(mark)
        except BrokenCallError:
            text, last = self._untape(), self._last
            if not text:  # part of a call
                self._ahead += last
            rest = len(mark) if len(text) <= _RESCANNED else len(text)
            self.out.content(text[:rest])
            self._ahead += reversed(text[rest:])
        except EndOfReply:
            self.out.content(self._untape())
            raise
        finally:
            self._tape = None

    def _untape(self) -> str:
        text, self._tape = self._tape or "", None
        return text

    def begin_call(self, name: Any) -> None:
        """Begins a call, from which there is no way back."""
        if not isinstance(name, str) or not name:
            raise BrokenCallError
        self._tape = None
        self.out.name(name)

    def begin_attempt(self) -> None:
        """Marks the beginning of a further call in the same marks."""
        self._tape = ""

    def _begins(self, mark: str) -> Reads[bool]:
        """True if the reply begins with a mark, which is read then."""
        held = ""
        try:
            while mark.startswith(held.lstrip()):
                if held.lstrip() == mark:
                    return True
                held += yield from self.char()
        except EndOfReply:
            self.out.content(held)
            raise
        self._ahead += reversed(held)
        return False

    def _reasoning(self, tags: Tags) -> Reads[None]:
        self.reasons = True
        yield from self.until((tags.end,), self.out.reasoning)
        self.reasons = False

    # Characters

    def char(self) -> Reads[str]:
        """The next character."""
        char = self._ahead.pop() if self._ahead else (yield)
        self._last = char
        if self._tape is not None:
            self._tape += char
        return char

    def back(self, char: str) -> None:
        """Puts a character back, to be read again."""
        self._ahead.append(char)
        self._last = ""
        if self._tape:
            self._tape = self._tape[:-1]

    def solid(self) -> Reads[str]:
        """The next character that is no whitespace."""
        while (char := (yield from self.char())).isspace():
            pass
        return char

    def until(self, marks: Sequence[str], emit: Callable[[str], object]) -> Reads[str]:
        """The first of some marks; text before it is emitted as soon as it can be no mark."""
        held = ""
        try:
            while True:
                held += yield from self.char()
                while held:
                    if held in marks:
                        return held
                    if any(mark.startswith(held) for mark in marks):
                        break
                    emit(held[0])
                    held = held[1:]
        except EndOfReply:
            if held:
                emit(held)
            raise

    def text_until(self, *marks: str) -> Reads[str]:
        """The text up to a mark, which is read too."""
        parts: list[str] = []
        yield from self.until(marks, parts.append)
        return "".join(parts)

    def literal(self, text: str) -> Reads[None]:
        """A fixed text.

        Raises:
            BrokenCallError: It is another.
        """
        for wanted in text:
            if (yield from self.char()) != wanted:
                raise BrokenCallError

    # JSON

    def call_object(self, known: bool = False) -> Reads[None]:
        """A call as an object with a name and arguments, in any order.

        Args:
            known: Whether only tools of the request are called, by an object that begins as a call does.

        Raises:
            BrokenCallError: It is none.
        """
        if (yield from self.solid()) != "{":
            raise BrokenCallError
        name, held, has_arguments = "", "", False
        while (char := (yield from self.solid())) != "}":
            if char != '"':
                raise BrokenCallError
            key = _loaded((yield from self._string()))
            if (yield from self.solid()) != ":":
                raise BrokenCallError
            if key in ("arguments", "parameters"):
                has_arguments = True
                if name:
                    yield from self.argument_value()
                else:
                    parts: list[str] = []
                    yield from self.value(parts.append)
                    held = _arguments("".join(parts))
            else:
                parts = []
                yield from self.value(parts.append)
                if key == "name" and not name:
                    name = _loaded("".join(parts))
                    if known and name not in (self.tools or {}):
                        raise BrokenCallError
                    self.begin_call(name)
                    self.out.arguments(held)
                elif known and not name and key not in ("type", "id"):
                    raise BrokenCallError
            char = yield from self.solid()
            if char == "}":
                break
            if char != ",":
                raise BrokenCallError
        if not name:
            raise BrokenCallError
        if not has_arguments:
            self.out.arguments("{}")

    def argument_value(self) -> Reads[None]:
        """Arguments as a JSON value; an object is passed on while it arrives."""
        char = yield from self.solid()
        self.back(char)
        if char in "{[":
            yield from self.value(self.out.arguments)
            return
        parts: list[str] = []
        yield from self.value(parts.append)
        self.out.arguments(_arguments("".join(parts)))

    def value(self, emit: Callable[[str], object]) -> Reads[None]:
        """A JSON value, of which only brackets and strings are looked at.

        Raises:
            BrokenCallError: There is none.
        """
        char = yield from self.solid()
        if char not in '{["':
            text = ""
            while char not in ",}]" and not char.isspace():
                text += char
                char = yield from self.char()
            self.back(char)
            if not text:
                raise BrokenCallError
            emit(text)
            return
        depth = 0
        while True:
            if char == '"':
                yield from self._string(emit)
            else:
                depth += (char in "{[") - (char in "}]")
                emit(char)
            if depth == 0:
                return
            char = yield from self.char()

    def _string(self, emit: Callable[[str], object] | None = None) -> Reads[str]:
        """A JSON string after its first quote; emitted, or returned, quotes and all."""
        parts = ['"']
        put: Callable[[str], object] = parts.append if emit is None else emit
        if emit is not None:
            emit('"')
        while True:
            char = yield from self.char()
            put(char)
            if char == "\\":
                put((yield from self.char()))
            elif char == '"':
                return "".join(parts)


def types_of(schema: Any) -> tuple[str, ...]:
    """Names of the types that a JSON schema allows at its top."""
    if not isinstance(schema, dict):
        return ()
    declared = schema.get("type")
    found = [declared] if isinstance(declared, str) else []
    if isinstance(declared, list):
        found += [each for each in declared if isinstance(each, str)]
    for union in ("anyOf", "oneOf"):
        choices = schema.get(union)
        for each in choices if isinstance(choices, list) else ():
            found += types_of(each)
    return tuple(dict.fromkeys(found))


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise BrokenCallError from error


def _arguments(text: str) -> str:
    """Arguments of another form as JSON text: those that are text already, and none."""
    if text.startswith('"'):
        with suppress(BrokenCallError):
            return str(_loaded(text))
    return "{}" if text == "null" else text
