"""Between model.generate and the decoding loop: criteria, stop strings, streamers, padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from retrieval_draft.engine.decode import DecodeRequest
from retrieval_draft.errors import InvalidInputError

__all__ = ["pad_replies", "set_limits", "streaming", "take_stop_strings"]


def set_limits(
    request: DecodeRequest, criteria: StoppingCriteriaList, config: GenerationConfig, padding: int
) -> None:
    """Turns length and eos criteria into numbers, and leaves the others to be called.

    Args:
        request: Its `max_length`, `eos`, `criteria` and `prefill_chunk` are set.
        criteria: As prepared by model.generate.
        config: As prepared by model.generate.
        padding: Left padding of this prompt, which max_length counts and the request does not.
    """
    lengths: list[int] = []
    eos: set[int] = set()
    others = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length - padding)
        elif type(criterion) is EosTokenCriteria:
            eos.update(criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    request.max_length = min(lengths) if lengths else int(config.max_length) - padding
    request.eos = frozenset(int(token) for token in eos)
    request.criteria = StoppingCriteriaList(others)
    request.prefill_chunk = config.prefill_chunk_size


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


def pad_replies(input_ids: Tensor, replies: list[Tensor], config: GenerationConfig) -> Tensor:
    """Prompts with their replies, right-padded to one length.

    Args:
        input_ids: int64, shape (batch, length), left padding included.
        replies: int64, shape (new,) each.
        config: Holds the pad token, as prepared by model.generate.

    Returns:
        int64, shape (batch, length + longest reply).
    """
    begin = input_ids.shape[1]
    pad = getattr(config, "_pad_token_tensor", None)
    out = input_ids.new_zeros((len(replies), begin + max(len(reply) for reply in replies)))
    out[:, :begin] = input_ids
    for row, reply in enumerate(replies):
        end = begin + len(reply)
        out[row, begin:end] = reply.to(out.device)
        if end < out.shape[1] and pad is not None:
            out[row, end:] = pad.to(out.device)
    return out


@contextlib.contextmanager
def streaming(streamer: Any, input_ids: Tensor) -> Iterator[Callable[[int], None] | None]:
    """Hands the prompt to the streamer, yields what takes its tokens, and ends it in any case."""
    if streamer is None:
        yield None
        return
    try:
        streamer.put(input_ids.cpu())
        yield lambda token: streamer.put(torch.tensor([token]))
    finally:
        streamer.end()
