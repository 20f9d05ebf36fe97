"""Stop strings and token healing with the caller's tokenizer, and streamers for one row or several."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from retrieval_draft.engine.compat import hidden_arguments
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError

__all__ = [
    "ShownPrompt",
    "StreamRows",
    "WithoutEnd",
    "effective",
    "ending",
    "heal_tokens",
    "shown_streamer",
    "stream_rows",
    "take_stop_strings",
]


def take_stop_strings(
    model: Any, config: GenerationConfig | None, options: dict[str, Any], tokenizer: Any
) -> GenerationConfig | None:
    """Makes the criterion for stop strings, since transformers drops the tokenizer for custom loops.

    Args:
        model: Of transformers; its own generation configuration may hold stop strings too.
        config: The caller's, left as it is.
        options: Keyword arguments for model.generate, changed in place.
        tokenizer: Decodes the reply.

    Returns:
        The configuration without stop strings.

    Raises:
        InvalidInputError: Stop strings without a tokenizer.
    """
    strings = effective(model, config, options, "stop_strings")
    if strings is None:
        return config
    if tokenizer is None:
        raise InvalidInputError(
            "stop_strings need a tokenizer.", "Pass tokenizer= to RetrievalDrafter.for_model, or to generate."
        )
    criteria = [*(options.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    options["stopping_criteria"] = StoppingCriteriaList(criteria)
    return _without(model, config, options, "stop_strings")


def heal_tokens(
    model: Any, input_ids: Any, config: GenerationConfig | None, options: dict[str, Any], tokenizer: Any
) -> tuple[Any, GenerationConfig | None]:
    """Heals the prompts' last tokens on request, as model.generate does with its tokenizer.

    Args:
        model: Of transformers.
        input_ids: Integers, shape (batch, length), or None.
        config: The caller's, left as it is.
        options: Keyword arguments for model.generate, changed in place.
        tokenizer: The model's.

    Returns:
        The prompts, and the configuration without token healing.

    Raises:
        InvalidInputError: There is no tokenizer.
        UnsupportedGenerationError: The tokenizer makes another number of tokens of the prompts' text.
    """
    if not effective(model, config, options, "token_healing"):
        return input_ids, config
    if tokenizer is None:
        raise InvalidInputError(
            "token_healing needs a tokenizer.",
            "Pass tokenizer= to RetrievalDrafter.for_model, or to generate.",
        )
    config = _without(model, config, options, "token_healing")
    if input_ids is None:
        return input_ids, config
    healed = model.heal_tokens(input_ids.clone(), tokenizer)
    if healed.shape != input_ids.shape:
        raise UnsupportedGenerationError(
            f"token_healing is not supported here: of the prompts' text, shape {tuple(input_ids.shape)}, the "
            f"tokenizer makes {tuple(healed.shape)}.",
            "Pass prompts as the tokenizer writes them, without special tokens or blanks at the ends.",
        )
    return healed, config


def effective(model: Any, config: GenerationConfig | None, options: dict[str, Any], name: str) -> Any:
    """An option as model.generate takes it: the argument, else the caller's configuration or the model's."""
    if name in options:
        return options[name]
    found = None if config is None else getattr(config, name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def _without(
    model: Any, config: GenerationConfig | None, options: dict[str, Any], name: str
) -> GenerationConfig | None:
    """The caller's configuration without one option; an argument overrides it in the model's own."""
    options.pop(name, None)
    if config is not None and getattr(config, name, None) is not None:
        config = copy.deepcopy(config)
        setattr(config, name, None)
    if getattr(model.generation_config, name, None):
        options[name] = None
    return config


class StreamRows:
    """Passes a streamer the tokens of rows that do not advance together, as model.generate would.

    One row's tokens are passed on at once, shape (1,). Of several, a position is passed on when every row has
    it or has ended before it; ended rows are padded: shape (rows,).

    Args:
        streamer: Anything with `put`.
        rows: Number of rows.
        pad: Token for rows that have ended.
    """

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self._streamer = streamer
        self._waiting: list[list[int]] = [[] for _ in range(rows)]
        self._ended = [False] * rows
        self._pad = pad

    def taker(self, row: int) -> Callable[[int], None]:
        """Returns a function that receives the tokens of one row."""
        if len(self._waiting) == 1:
            return lambda token: self._streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))

        def take(token: int) -> None:
            self._waiting[row].append(token)
            self._pass_on()

        return take

    def end(self, row: int) -> None:
        """Records that a row has ended."""
        self._ended[row] = True
        if len(self._waiting) > 1:
            self._pass_on()

    def _pass_on(self) -> None:
        while any(self._waiting) and all(
            tokens or ended for tokens, ended in zip(self._waiting, self._ended, strict=True)
        ):
            column = [tokens.pop(0) if tokens else self._pad for tokens in self._waiting]
            self._streamer.put(torch.tensor(column, dtype=torch.int64, device="cpu"))


class ShownPrompt:
    """A streamer to which model.generate has shown the prompt already: the first `put` does nothing.

    Args:
        streamer: Anything with `put` and `end`.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Passes tokens on, int64, shape (rows,); the prompt, (rows, length), is dropped."""
        if self._begun:
            self._streamer.put(tokens)
        self._begun = True

    def end(self) -> None:
        """Passes the end on."""
        self._streamer.end()


class WithoutEnd:
    """A streamer that is ended elsewhere, for loops that would end it.

    Args:
        streamer: Anything with `put`.
    """

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        """Does nothing."""


def shown_streamer(streamer: Any = None) -> ShownPrompt | None:
    """The streamer of the calling ``model.generate``, which has seen the prompt; None without.

    Args:
        streamer: The streamer, if transformers passes it on.
    """
    found = streamer if streamer is not None else (hidden_arguments() or {}).get("streamer")
    return None if found is None else ShownPrompt(found)


@contextlib.contextmanager
def ending(streamer: Any) -> Iterator[None]:
    """Ends a streamer afterwards in any case: another thread may wait for that.

    Args:
        streamer: Anything with `end`, or None.
    """
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def stream_rows(streamer: Any, input_ids: Tensor, config: GenerationConfig) -> StreamRows | None:
    """Passes the prompt to a streamer, and returns the receiver of its rows' tokens; None without one.

    Args:
        streamer: Anything with `put`, or None.
        input_ids: int64, shape (batch, length).
        config: Holds the pad token.
    """
    if streamer is None:
        return None
    streamer.put(input_ids.cpu())
    pad = getattr(config, "_pad_token_tensor", None)
    return StreamRows(streamer, len(input_ids), 0 if pad is None else int(pad))
