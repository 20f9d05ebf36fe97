"""Between model.generate and the decoding loop: stop strings, and streamers for one row or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from retrieval_draft.engine.compat import hidden_arguments
from retrieval_draft.errors import InvalidInputError

__all__ = [
    "ShownPrompt",
    "StreamRows",
    "shown_streamer",
    "streaming",
    "take_stop_strings",
]


def take_stop_strings(
    config: GenerationConfig | None, options: dict[str, Any], tokenizer: Any
) -> GenerationConfig | None:
    """Makes the criterion for stop strings, since transformers drops the tokenizer for custom loops.

    Args:
        config: The caller's, left as it is.
        options: Keyword arguments for model.generate, changed in place.
        tokenizer: The drafter's; one in `options` goes first.

    Returns:
        The configuration without stop strings.

    Raises:
        InvalidInputError: Stop strings without a tokenizer.
    """
    tokenizer = options.pop("tokenizer", None) or tokenizer
    strings = options.pop("stop_strings", None)
    if strings is None and config is not None and config.stop_strings is not None:
        strings = config.stop_strings
        config = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
    if strings is None:
        return config
    if tokenizer is None:
        raise InvalidInputError(
            "stop_strings need a tokenizer.", "Pass tokenizer= to RetrievalDrafter.for_model."
        )
    criteria = [*(options.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    options["stopping_criteria"] = StoppingCriteriaList(criteria)
    return config


class StreamRows:
    """Hands a streamer the tokens of rows that do not advance together, as model.generate would.

    One row's tokens go on at once, shape (1,). Of several, a position goes on when every row has it or has
    ended before it; ended rows are padded: shape (rows,).

    Args:
        streamer: Anything with `put`.
        rows: How many.
        pad: Token for rows that have ended.
    """

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self._streamer = streamer
        self._waiting: list[list[int]] = [[] for _ in range(rows)]
        self._ended = [False] * rows
        self._pad = pad

    def taker(self, row: int) -> Callable[[int], None]:
        """What takes the tokens of one row."""
        if len(self._waiting) == 1:
            return lambda token: self._streamer.put(torch.tensor([token]))

        def take(token: int) -> None:
            self._waiting[row].append(token)
            self._pass_on()

        return take

    def end(self, row: int) -> None:
        """Says that a row has ended."""
        self._ended[row] = True
        if len(self._waiting) > 1:
            self._pass_on()

    def _pass_on(self) -> None:
        while any(self._waiting) and all(
            tokens or ended for tokens, ended in zip(self._waiting, self._ended, strict=True)
        ):
            column = [tokens.pop(0) if tokens else self._pad for tokens in self._waiting]
            self._streamer.put(torch.tensor(column))


class ShownPrompt:
    """A streamer to which model.generate has shown the prompt already: the first `put` does nothing.

    Args:
        streamer: Anything with `put` and `end`.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Passes on all but the prompt."""
        if self._begun:
            self._streamer.put(tokens)
        self._begun = True

    def end(self) -> None:
        """Passes the end on."""
        self._streamer.end()


def shown_streamer(streamer: Any = None) -> ShownPrompt | None:
    """The streamer of the calling ``model.generate``, which has seen the prompt; None without.

    Args:
        streamer: It, should transformers hand it on.
    """
    found = streamer if streamer is not None else (hidden_arguments() or {}).get("streamer")
    return None if found is None else ShownPrompt(found)


@contextlib.contextmanager
def streaming(streamer: Any, input_ids: Tensor, config: GenerationConfig) -> Iterator[StreamRows | None]:
    """Hands the prompt to the streamer, yields what takes the tokens of its rows, and ends it in any case."""
    if streamer is None:
        yield None
        return
    try:
        streamer.put(input_ids.cpu())
        pad = getattr(config, "_pad_token_tensor", None)
        yield StreamRows(streamer, len(input_ids), 0 if pad is None else int(pad))
    finally:
        streamer.end()
