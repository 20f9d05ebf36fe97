"""Text of a reply while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = ["Decode", "ReplyText", "StopTexts", "decoder", "stopping_specials"]

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6
"""Prompt tokens that a reply's first tokens are decoded behind, for the space before a word."""

_PENDING = 16
"""Tokens that one character can take at most; more that end in none are bytes that are no text."""

_NO_SPECIALS: Mapping[int, str] = {}


def decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out."""

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    return decode


def stopping_specials(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """Special tokens that stand in stop strings: their texts by id.

    Args:
        tokenizer: Any of transformers.
        stops: Stop strings.
    """
    found: dict[int, str] = {}
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if getattr(added, "special", False) and any(str(added) in stop for stop in stops):
            found[int(token)] = str(added)
    return found


class ReplyText:
    """Turns tokens into text that is final: no half characters, and nothing that may become a stop string.

    Token by token, so that the text does not depend on how many come at once.

    Args:
        decode: Token ids to text.
        prompt: Token ids before the reply.
        stops: Strings at which the reply ends; they are not part of it.
        specials: Texts of special tokens by id, which stop strings see and nobody else.
        keeps_stop: Whether the text ends with the stop string after all.

    Attributes:
        text: All that is final.
        stopped: The stop string that was found; None while there is none.
        pieces: What each token made final.
        offsets: Where each token stands in the text; that of a half character where the character stands.

    Example:
        stop "END", tokens "a", "E", "N", "x"  ->  "a", "", "", "ENx"
    """

    def __init__(
        self,
        decode: Decode,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        specials: Mapping[int, str] = _NO_SPECIALS,
        keeps_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        self._read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""
        self._stops = [stop for stop in stops if stop]
        self._specials, self._keeps_stop = specials, keeps_stop
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # parts of what is held that stop strings alone see
        self.text = ""
        self.stopped: str | None = None
        self.pieces: list[str] = []
        self.offsets: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Takes tokens, and returns what became final. Nothing comes after a stop string."""
        before = len(self.text)
        for token in tokens:
            begin = len(self.text)
            self.offsets.append(begin + len(self._shown(len(self._held))))
            if self.stopped is None:
                self._push(int(token))
            self.pieces.append(self.text[begin:])
        return self.text[before:]

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        before = len(self.text)
        if self.stopped is None:
            whole = self._decode(self._ids)
            if len(whole) > len(self._known):
                self._take(whole)
            if self.stopped is None:
                self._release(len(self._held))
            self._held, self._hidden = "", []
        return self.text[before:]

    def _push(self, token: int) -> None:
        self._ids.append(token)
        whole = self._decode(self._ids)
        pending = len(self._ids) - self._read
        special = self._specials.get(token)
        complete = special is not None or not whole.endswith("\ufffd") or pending > _PENDING
        if complete and len(whole) > len(self._known):
            self._take(whole)
        if special is not None and self.stopped is None:
            self._hidden.append((len(self._held), len(self._held) + len(special)))
            self._held += special
            self._look()

    def _take(self, whole: str) -> None:
        piece = whole[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        self._held += piece
        self._look()

    def _look(self) -> None:
        """Looks for stop strings in what is held, and lets go of what can be none."""
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found, key=lambda each: (each[0], -len(each[1])))
            self._release(place + len(self.stopped) if self._keeps_stop else place)
            self._held, self._hidden = "", []
            return
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        self._release(len(self._held) - keep)

    def _release(self, end: int) -> None:
        self.text += self._shown(end)
        self._held = self._held[end:]
        self._hidden = [(max(b - end, 0), e - end) for b, e in self._hidden if e > end]

    def _shown(self, end: int) -> str:
        """What of ``held[:end]`` is text."""
        parts, place = [], 0
        for begin, stop in self._hidden:
            parts.append(self._held[place : min(begin, end)])
            place = min(stop, end)
        parts.append(self._held[place:end])
        return "".join(parts)


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
