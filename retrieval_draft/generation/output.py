"""Outputs of generation: finished rows in the shapes of model.generate's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.engine.cache.cache_rows import CacheRows
from retrieval_draft.engine.compat import output_cache_name
from retrieval_draft.engine.row import Row

__all__ = ["GenerateOutput", "best_rows", "make_output", "pad_replies"]


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """Output of model.generate with further fields on request.

    Attributes:
        prompt_logits: For each row float32, shape (its prompt, vocabulary): the model's logits after each
            token of the prompt. Without the tokens that a given cache held already.
        logprobs: For each row float32, shape (its reply,): log probability of each token under the
            distribution it was drawn from, after all processors. Given with ``best_of``.
    """

    prompt_logits: tuple[Tensor, ...] | None = None
    logprobs: tuple[Tensor, ...] | None = None


def make_output(rows: Sequence[Row], input_ids: Tensor, config: GenerationConfig) -> Any:
    """Sequences, or with ``return_dict_in_generate`` all that was kept while decoding.

    Scores and logits come position by position, shape (batch, vocabulary) each, as from model.generate. A
    row that has ended has zeros from there on.

    Args:
        rows: In the order of `input_ids`.
        input_ids: Integers, shape (batch, length), left padding included.
        config: As prepared by model.generate.
    """
    replies = [torch.from_numpy(row.text.reply.astype(np.int64)) for row in rows]
    # The dtype of model.generate, for any dtype of the prompts.
    sequences = pad_replies(input_ids.long(), replies, config)
    if not config.return_dict_in_generate:
        return sequences
    samplers = [row.request.sampler for row in rows]
    scores = [sampler.scores for sampler in samplers if sampler is not None and sampler.scores is not None]
    logits = [sampler.logits for sampler in samplers if sampler is not None and sampler.logits is not None]
    logprobs = [sampler.logprobs for sampler in samplers if sampler is not None and sampler.logprobs]
    prompts = [row.prompt_logits for row in rows if row.prompt_logits is not None]
    for row in rows:
        row.target.release(row.cache)
    caches = [row.cache for row in rows]
    kind: Any = GenerateOutput if prompts or logprobs else GenerateDecoderOnlyOutput
    fields: dict[str, Any] = {
        "sequences": sequences,
        "scores": _by_position(scores) if scores else None,
        "logits": _by_position(logits) if logits else None,
        output_cache_name(): caches[0] if len(caches) == 1 else CacheRows(caches),
    }
    if logprobs or prompts:
        fields["logprobs"] = (
            tuple(torch.from_numpy(np.array(each, np.float32)) for each in logprobs) if logprobs else None
        )
        fields["prompt_logits"] = tuple(prompts) if prompts else None
    return kind(**fields)


def _by_position(kept: Sequence[list[Tensor]]) -> tuple[Tensor, ...]:
    if len(kept) == 1:
        return tuple(kept[0])
    ended = torch.zeros_like(kept[0][0])
    longest = max(len(row) for row in kept)
    return tuple(
        torch.cat([row[position] if position < len(row) else ended for row in kept])
        for position in range(longest)
    )


def best_rows(rows: Sequence[Row], sampled: int, kept: int) -> list[int]:
    """Indices of the samples of each prompt to return, by mean log probability of a token, the best first.

    Args:
        rows: `sampled` of each prompt, one prompt after the other.
        sampled: Samples of a prompt.
        kept: Number of them to keep.

    Example:
        means [-2, -1, -3, -1, -5, -4], three samples each, one kept  ->  [1, 3]
    """
    means = []
    for row in rows:
        sampler = row.request.sampler
        assert sampler is not None
        means.append(sampler.logprob / max(len(row.text.reply), 1))
    chosen: list[int] = []
    for begin in range(0, len(rows), sampled):
        best = sorted(range(begin, begin + sampled), key=lambda row: -means[row])
        chosen += best[:kept]
    return chosen


def pad_replies(input_ids: Tensor, replies: Sequence[Tensor], config: GenerationConfig) -> Tensor:
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
