"""Incremental text of a reply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = [
    "Decode",
    "ReplyText",
    "StopTexts",
    "decoder",
    "selective_decoder",
    "special_tokens",
    "stopping_specials",
]

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6
"""Prompt tokens before a reply's first tokens in decoding, for the space before a word."""

_PENDING = 16
"""Largest number of tokens of one character; more without a complete character are bytes that are no text."""

_NO_SPECIALS: Mapping[int, str] = {}


def decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out."""

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    return decode


def selective_decoder(
    tokenizer: Any, kept: Collection[str] | None = (), dropped: Collection[int] = ()
) -> Decode:
    """Token ids to text, with some special tokens in it.

    Args:
        tokenizer: Any of transformers.
        kept: Texts of the special tokens that stay; None for all.
        dropped: Ids that are left out in any case.
    """
    hidden = set(dropped)
    if kept is not None:
        hidden |= {token for token, text in special_tokens(tokenizer).items() if text not in kept}

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            [token for token in tokens if token not in hidden],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text

    return decode


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Texts of all special tokens by id."""
    ids = list(getattr(tokenizer, "all_special_ids", ()))
    named = zip(ids, getattr(tokenizer, "all_special_tokens", ()), strict=False)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        **{int(token): str(text) for token, text in named},
        **{int(token): str(each) for token, each in added.items() if getattr(each, "special", False)},
    }


def stopping_specials(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """Texts of the special tokens in stop strings, by id.

    Args:
        tokenizer: Any of transformers.
        stops: Stop strings.
    """
    texts = special_tokens(tokenizer).items()
    return {token: text for token, text in texts if any(text in stop for stop in stops)}


class ReplyText:
    """Turns tokens into text that is final: no half characters, and nothing that may become a stop string.

    Tokens are processed one by one, so that the text does not depend on how many arrive at once.

    Args:
        decode: Token ids to text.
        prompt: Token ids before the reply.
        stops: Strings at which the reply ends; they are not part of it.
        specials: Texts of special tokens by id, which only stop strings see.
        keeps_stop: Whether the text includes the stop string.
        least: Tokens in which no stop string is looked for.

    Attributes:
        text: All that is final.
        stopped: The stop string that was found; None while there is none.
        pieces: Text that each token made final.
        offsets: Offset of each token in the text; for a part of a character that of the character.

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
        least: int = 0,
    ) -> None:
        self._decode = decode
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        self._read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""
        self._stops = [stop for stop in stops if stop]
        self._specials, self._keeps_stop, self._least = specials, keeps_stop, least
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # parts of the held text that only stop strings see
        self.text = ""
        self.stopped: str | None = None
        self.pieces: list[str] = []
        self.offsets: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens, and returns the text that became final; none after a stop string."""
        before = len(self.text)
        for token in tokens:
            begin = len(self.text)
            self.offsets.append(begin + len(self._shown(len(self._held))))
            if self.stopped is None:
                self._push(int(token))
            self.pieces.append(self.text[begin:])
        return self.text[before:]

    def finish(self) -> str:
        """Returns the held text at the end of the tokens."""
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
        """Looks for stop strings in the held text, and releases text that cannot be part of one."""
        if len(self.pieces) < self._least:
            self._release(len(self._held))
            return
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            position, self.stopped = min(found, key=lambda each: (each[0], -len(each[1])))
            self._release(position + len(self.stopped) if self._keeps_stop else position)
            self._held, self._hidden = "", []
            return
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        self._release(len(self._held) - keep)

    def _release(self, end: int) -> None:
        self.text += self._shown(end)
        self._held = self._held[end:]
        self._hidden = [(max(b - end, 0), e - end) for b, e in self._hidden if e > end]

    def _shown(self, end: int) -> str:
        """The part of ``held[:end]`` that is text."""
        parts, position = [], 0
        for begin, stop in self._hidden:
            parts.append(self._held[position : min(begin, end)])
            position = min(stop, end)
        parts.append(self._held[position:end])
        return "".join(parts)


class StopTexts(StoppingCriteria):
    """Ends a row when its reply contains a stop string.

    Args:
        text: The row's own, which gets each token once.
    """

    def __init__(self, text: ReplyText) -> None:
        self.text = text
        self._yes, self._no = torch.tensor([True]), torch.tensor([False])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """True if the text has ended: bool, shape (1,)."""
        self.text.push([int(input_ids[0, -1])])
        ended = self._no if self.text.stopped is None else self._yes
        return ended.to(input_ids.device)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
