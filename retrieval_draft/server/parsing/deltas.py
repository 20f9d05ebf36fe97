"""Parts of a message, in the order in which a parser finds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["Call", "Delta", "DeltaWriter", "Message", "ReplyParser"]

Kind = Literal["content", "reasoning", "name", "arguments"]


@dataclass(frozen=True, slots=True)
class Delta:
    """A new part of a message.

    Attributes:
        kind: "name" begins a call.
        text: The new text.
        call: Index of the call; -1 for content and reasoning.
    """

    kind: Kind
    text: str
    call: int = -1


class ReplyParser(Protocol):
    """A parser of one reply."""

    @property
    def reasons(self) -> bool:
        """True while the text is reasoning."""
        ...

    def feed(self, text: str) -> list[Delta]:
        """Parses more text; the deltas of all calls together do not depend on its cuts."""
        ...

    def finish(self) -> list[Delta]:
        """Parses the end of the text, complete or not."""
        ...


@dataclass(slots=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """The message so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, deltas: list[Delta]) -> None:
        """Appends new parts."""
        for delta in deltas:
            if delta.kind == "name":
                self.calls.append(Call(delta.text))
            elif delta.kind == "arguments":
                self.calls[delta.call].arguments += delta.text
            elif delta.kind == "content":
                self.content += delta.text
            else:
                self.reasoning += delta.text


class DeltaWriter:
    """Collects deltas, and joins those that belong together.

    Whitespace around reasoning and around calls is no part of the message. So whitespace waits for the text
    after it: it is dropped at both ends of the reasoning, and at both ends of the content wherever the reply
    has other parts; content alone stays as it is.

    Args:
        one_call: Whether calls after the first are dropped.
    """

    def __init__(self, one_call: bool = False) -> None:
        self._one_call = one_call
        self._deltas: list[Delta] = []
        self._calls = 0
        self._waiting = {"content": "", "reasoning": ""}
        self._has = {"content": False, "reasoning": False}

    @property
    def has_calls(self) -> bool:
        """True if a call has begun."""
        return self._calls > 0

    def content(self, text: str) -> None:
        """Adds text of the content."""
        self._text("content", text)

    def reasoning(self, text: str) -> None:
        """Adds text of the reasoning."""
        self._text("reasoning", text)

    def name(self, name: str) -> None:
        """Begins a call."""
        self._calls += 1
        self._put("name", name)

    def arguments(self, text: str) -> None:
        """Adds to the arguments of the last call."""
        if text:
            self._put("arguments", text)

    def take(self) -> list[Delta]:
        """Returns new deltas, and forgets them."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def end(self) -> list[Delta]:
        """As `take`, at the end of the reply."""
        if not self._has["reasoning"] and not self._calls:
            self._put("content", self._waiting["content"])
        return self.take()

    def _text(self, kind: Any, text: str) -> None:
        text = self._waiting[kind] + text
        body = text.rstrip()
        self._waiting[kind] = text[len(body) :]
        if not body:
            return
        if not self._has[kind] and (kind == "reasoning" or self._has["reasoning"] or self._calls):
            body = body.lstrip()
        self._has[kind] = True
        self._put(kind, body)

    def _put(self, kind: Any, text: str) -> None:
        call = self._calls - 1 if kind in ("name", "arguments") else -1
        if not text or (self._one_call and call > 0):
            return
        last = self._deltas[-1] if self._deltas else None
        if last is not None and kind != "name" and (last.kind, last.call) == (kind, call):
            self._deltas[-1] = Delta(kind, last.text + text, call)
        else:
            self._deltas.append(Delta(kind, text, call))
