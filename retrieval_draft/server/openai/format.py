"""Replies in the formats of OpenAI's API: completions and chat completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Any, Protocol

from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.openai.token_text import TokenTexts

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


class _Common:
    """Common fields of both formats.

    Args:
        id: Of the response.
        model: Name of the model for clients.
        texts: Tokens as text.
        with_ids: Whether token ids are wanted.
        with_logprobs: Whether log probabilities are.
    """

    kind = ""
    piece_kind = ""

    def __init__(self, id: str, model: str, texts: TokenTexts, with_ids: bool, with_logprobs: bool) -> None:
        self._head = {"id": id, "created": int(time()), "model": model}
        self._texts, self._with_ids, self._with_logprobs = texts, with_ids, with_logprobs

    def last(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """A piece without choices."""
        return self._piece([]) | ({} if usage is None else {"usage": usage})

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.piece_kind, "choices": choices}

    def _whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        choices.sort(key=lambda choice: int(choice["index"]))
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def _says_nothing(self, reply: Reply, text: str) -> bool:
        return not (text or reply.reason or self._with_ids or self._with_logprobs)

    def _ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self._with_ids else {}


class CompletionFormat(_Common):
    """``text_completion``. Text offsets count from the beginning of the returned text."""

    kind = piece_kind = "text_completion"

    def begin(self, reply: Reply) -> list[dict[str, Any]]:
        """The prompt, where it is echoed."""
        if reply.prompt_text is None:
            return []
        logprobs = self._logprobs(*_echoed(reply), reply.prompt_offsets) if self._with_logprobs else None
        return [
            self._piece([self._choice(index, reply.prompt_text, logprobs, None)]) for index in reply.indices
        ]

    def piece(self, reply: Reply, text: str, begin: int, end: int) -> list[dict[str, Any]]:
        """New text."""
        if self._says_nothing(reply, text):
            return []
        tokens = reply.tokens[begin:end]
        logprobs = None
        if self._with_logprobs:
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
            if self._with_logprobs:
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
        texts = [self._texts.text(token) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for token, each in zip(tokens, logprobs, strict=True):
            if each is None:
                tops.append(None)
                continue
            named = zip(each.top, each.top_logprobs, strict=True)
            top = {self._texts.text(other): _finite(value) for other, value in named}
            tops.append({**top, self._texts.text(token): _finite(each.logprob)})
        return {
            "tokens": texts,
            "token_logprobs": [None if each is None else _finite(each.logprob) for each in logprobs],
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }


class ChatFormat(_Common):
    """``chat.completion``."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def begin(self, reply: Reply) -> list[dict[str, Any]]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return [self._piece([self._delta(index, delta, None, None)]) for index in reply.indices]

    def piece(self, reply: Reply, text: str, begin: int, end: int) -> list[dict[str, Any]]:
        """New text."""
        if self._says_nothing(reply, text):
            return []
        tokens = reply.tokens[begin:end]
        logprobs = self._logprobs(reply.logprobs[begin:end]) if self._with_logprobs else None
        delta = {"content": text} if text or reply.reason is None else {}
        return [
            self._piece([self._delta(index, delta, logprobs, reply.reason) | self._ids(tokens)])
            for index in reply.indices
        ]

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": self._logprobs(reply.logprobs) if self._with_logprobs else None,
                "finish_reason": reply.reason,
                **self._ids(reply.tokens),
            }
            for reply in replies
            for index in reply.indices
        ]
        return self._whole(choices, usage)

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
        text, raw = self._texts.text(token), self._texts.bytes(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


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
