"""Replies in the formats of OpenAI's API: completions and chat completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any, ClassVar, Protocol

from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.openai.token_text import TokenTexts
from retrieval_draft.server.parsing.deltas import Delta

__all__ = ["ChatFormat", "CompletionFormat", "ResponseFormat"]

_LEAST = -9999.0
"""Log probability for minus infinity, which JSON does not have."""


class ResponseFormat(Protocol):
    """The response format of one request."""

    def begin(self, reply: Reply) -> list[dict[str, Any]]:
        """Pieces before the first token."""
        ...

    def piece(self, reply: Reply, text: str, begin: int, end: int) -> list[dict[str, Any]]:
        """Pieces with new text, and tokens ``begin:end``; with the reason, if the reply has ended."""
        ...

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""
        ...

    def last(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """A piece without choices."""
        ...


@dataclass(frozen=True)
class _Common:
    """Common fields of both formats.

    Attributes:
        id: Of the response.
        model: Name of the model for clients.
        texts: Tokens as text.
        with_ids: Whether token ids are wanted.
        with_logprobs: Whether log probabilities are.
        created: Seconds since 1970.
    """

    kind: ClassVar[str]
    piece_kind: ClassVar[str]
    id: str
    model: str
    texts: TokenTexts
    with_ids: bool
    with_logprobs: bool
    created: int = field(default_factory=lambda: int(time()), kw_only=True)

    def last(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """A piece without choices."""
        return self._piece([]) | ({} if usage is None else {"usage": usage})

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "created": self.created, "model": self.model}
        return {**head, "object": kind, "choices": choices}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.piece_kind, choices)

    def _whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        choices.sort(key=lambda choice: int(choice["index"]))
        return self._head(self.kind, choices) | {"usage": usage}

    def _says_nothing(self, reply: Reply, text: Sequence[Any]) -> bool:
        return not (text or reply.reason or self.with_ids or self.with_logprobs)

    def _ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self.with_ids else {}


class CompletionFormat(_Common):
    """``text_completion``. Text offsets count from the beginning of the returned text."""

    kind = piece_kind = "text_completion"

    def begin(self, reply: Reply) -> list[dict[str, Any]]:
        """The prompt, where it is echoed."""
        if reply.prompt_text is None:
            return []
        logprobs = self._logprobs(*_echoed(reply), reply.prompt_offsets) if self.with_logprobs else None
        return [
            self._piece([self._choice(index, reply.prompt_text, logprobs, None)]) for index in reply.indices
        ]

    def piece(self, reply: Reply, text: str, begin: int, end: int) -> list[dict[str, Any]]:
        """New text."""
        if self._says_nothing(reply, text):
            return []
        tokens = reply.tokens[begin:end]
        logprobs = None
        if self.with_logprobs:
            logprobs = self._logprobs(tokens, reply.logprobs[begin:end], _offsets(reply)[begin:end])
        return [
            self._piece([self._choice(index, text, logprobs, reply.reason) | self._ids(tokens)])
            for index in reply.indices
        ]

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices."""
        choices = []
        for reply in replies:
            text, logprobs = (reply.prompt_text or "") + reply.text, None
            if self.with_logprobs:
                tokens, prompt_logprobs = _echoed(reply) if reply.prompt_text is not None else ([], [])
                offsets = [*reply.prompt_offsets, *_offsets(reply)]
                logprobs = self._logprobs(
                    [*tokens, *reply.tokens], [*prompt_logprobs, *reply.logprobs], offsets
                )
            for index in reply.indices:
                choice = self._choice(index, text, logprobs, reply.reason)
                choices.append(choice | self._ids(reply.tokens))
        return self._whole(choices, usage)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        texts = [self.texts.text(token) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for token, each in zip(tokens, logprobs, strict=True):
            if each is None:
                tops.append(None)
                continue
            named = zip(each.top, each.top_logprobs, strict=True)
            top = {self.texts.text(other): _finite(value) for other, value in named}
            tops.append({**top, self.texts.text(token): _finite(each.logprob)})
        return {
            "tokens": texts,
            "token_logprobs": [None if each is None else _finite(each.logprob) for each in logprobs],
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }


@dataclass(frozen=True, kw_only=True)
class ChatFormat(_Common):
    """``chat.completion``.

    Attributes:
        role: Of the message.
        echoed: The beginning of the message, which the prompt had.
        names_calls: Whether "tool_calls" is the reason of the end of a reply that calls tools.
    """

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    role: str = "assistant"
    echoed: str = ""
    names_calls: bool = True

    def begin(self, reply: Reply) -> list[dict[str, Any]]:
        """The role."""
        delta = {"role": self.role, "content": self.echoed}
        return [self._piece([self._delta(index, delta, None, None)]) for index in reply.indices]

    def piece(self, reply: Reply, text: str, begin: int, end: int) -> list[dict[str, Any]]:
        """New text, or new parts of the message, one a piece; the first has all of the tokens."""
        if self._says_nothing(reply, text if reply.message is None else reply.deltas):
            return []
        tokens = reply.tokens[begin:end]
        logprobs = self._logprobs(reply.logprobs[begin:end]) if self.with_logprobs else None
        if reply.message is None:
            deltas = [{"content": text} if text or reply.reason is None else {}]
        else:
            deltas = [_part(reply, delta) for delta in reply.deltas] or [{}]
            if reply.reason is not None and deltas[-1]:
                deltas.append({})  # the reason stands alone
        last = len(deltas) - 1
        return [
            self._piece(
                [
                    self._delta(
                        index,
                        delta,
                        None if number else logprobs,
                        self._reason(reply) if number == last else None,
                    )
                    | self._ids(() if number else tokens)
                ]
            )
            for number, delta in enumerate(deltas)
            for index in reply.indices
        ]

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices."""
        choices = [
            {
                "index": index,
                "message": self._message(reply),
                "logprobs": self._logprobs(reply.logprobs) if self.with_logprobs else None,
                "finish_reason": self._reason(reply),
                **self._ids(reply.tokens),
            }
            for reply in replies
            for index in reply.indices
        ]
        return self._whole(choices, usage)

    def _message(self, reply: Reply) -> dict[str, Any]:
        message = reply.message
        content = reply.text if message is None else message.content
        fields: dict[str, Any] = {"role": self.role, "content": self.echoed + content, "refusal": None}
        if message is not None and message.reasoning:
            fields["reasoning_content"] = message.reasoning
        if message is not None and message.calls:
            fields["content"] = fields["content"] or None
            fields["tool_calls"] = [
                {
                    "id": reply.call_id(index),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(message.calls)
            ]
        return fields

    def _reason(self, reply: Reply) -> str | None:
        """The reason of the end. A call of the one tool that was to be called is no reason, as of OpenAI."""
        if reply.reason != "stop" or reply.message is None or not reply.message.calls:
            return reply.reason
        return "tool_calls" if self.names_calls and not reply.has_cut_call else "stop"

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = []
        for each in logprobs:
            named = zip(each.top, each.top_logprobs, strict=True)
            top = [self._token(token, value) for token, value in named]
            content.append({**self._token(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.texts.text(token), self.texts.bytes(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _part(reply: Reply, delta: Delta) -> dict[str, Any]:
    """A part of a message as OpenAI's ``delta``."""
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    if delta.kind == "arguments":
        return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}
    function = {"name": delta.text, "arguments": ""}
    call = {"index": delta.call, "id": reply.call_id(delta.call), "type": "function", "function": function}
    return {"tool_calls": [call]}


def _echoed(reply: Reply) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens of the prompt and their log probabilities: None for the first."""
    logprobs = [] if reply.prompt_logprobs is None else reply.prompt_logprobs.logprobs
    return list(reply.prompt), [None, *logprobs]


def _offsets(reply: Reply) -> list[int]:
    """Offsets of the reply's tokens in the text; for those of a stop string, which is not in it, its end."""
    begin = len(reply.prompt_text or "")
    end = len(reply.text) if reply.reason is not None else max(reply.offsets, default=0)
    return [begin + min(offset, end) for offset in reply.offsets]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
