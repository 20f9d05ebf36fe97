"""Text of a reply while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = ["Decode", "ReplyText", "StopTexts", "decoder"]

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6
"""Prompt tokens that a reply's first tokens are decoded behind, for the space before a word."""

_PENDING = 16
"""Tokens that one character can take at most; more that end in none are bytes that are no text."""


def decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out."""

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    return decode


class ReplyText:
    """Turns tokens into text that is final: no half characters, and nothing that may become a stop string.

    Token by token, so that the text does not depend on how many come at once.

    Args:
        decode: Token ids to text.
        prompt: Token ids before the reply.
        stops: Strings at which the reply ends; they are not part of it.

    Attributes:
        text: All that is final.
        stopped: The stop string that was found; None while there is none.

    Example:
        stop "END", tokens "a", "E", "N", "x"  ->  "a", "", "", "ENx"
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        self._read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """Takes tokens, and returns what became final. Nothing comes after a stop string."""
        before = len(self.text)
        for token in tokens:
            if self.stopped is not None:
                break
            self._ids.append(int(token))
            whole = self._decode(self._ids)
            pending = len(self._ids) - self._read
            if (not whole.endswith("\ufffd") or pending > _PENDING) and len(whole) > len(self._known):
                self._take(whole)
        return self.text[before:]

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        before = len(self.text)
        if self.stopped is None:
            whole = self._decode(self._ids)
            if len(whole) > len(self._known):
                self._take(whole)
            if self.stopped is None:
                self.text += self._held
            self._held = ""
        return self.text[before:]

    def _take(self, whole: str) -> None:
        piece = whole[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        self._held += piece
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found, key=lambda each: (each[0], -len(each[1])))
            self.text += self._held[:place]
            self._held = ""
            return
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        end = len(self._held) - keep
        self.text += self._held[:end]
        self._held = self._held[end:]


class StopTexts(StoppingCriteria):
    """Ends a row when a stop string stands in its reply.

    Args:
        text: The row's own, which sees each token once.
    """

    def __init__(self, text: ReplyText) -> None:
        self.text = text
        self._yes, self._no = torch.tensor([True]), torch.tensor([False])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether the text has ended: bool, shape (1,)."""
        self.text.push([int(input_ids[0, -1])])
        ended = self._no if self.text.stopped is None else self._yes
        return ended.to(input_ids.device)


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
