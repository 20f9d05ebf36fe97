"""Has model.generate prepare what is to be decoded, so that its options mean what they mean there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from retrieval_draft.engine.target import Target
from retrieval_draft.engine.threads import in_live_pool
from retrieval_draft.generation import take_stop_strings
from retrieval_draft.inputs import check_new_tokens, check_options, check_prompt

__all__ = ["Decode", "through_model"]

Decode = Callable[[Tensor, LogitsProcessorList, StoppingCriteriaList, GenerationConfig, dict[str, Any]], Any]
"""Prompts, logits processors, stopping criteria, configuration and model inputs, all as prepared."""


def through_model(
    target: Target,
    tokenizer: Any,
    decode: Decode,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig | None,
    options: dict[str, Any],
) -> Any:
    """Checks the options, and returns what `decode` makes of what model.generate prepares of them.

    Args:
        target: The model.
        tokenizer: For stop strings.
        decode: What to do in place of model.generate's own loop.
        input_ids: int64, shape (batch, length).
        attention_mask: Zeros mark left padding.
        config: The caller's.
        options: Keyword arguments for model.generate.
    """
    check_prompt(input_ids, attention_mask, target.embedding_rows, target.max_positions)
    check_new_tokens(config, options)
    check_options(options)
    config = take_stop_strings(config, options, tokenizer)

    def loop(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> Any:
        return decode(input_ids, logits_processor, stopping_criteria, generation_config, model_inputs)

    # Of the class: model.generate may have been replaced by a drafter's own.
    kind: Any = type(target.model)
    generate = kind.generate
    return in_live_pool(
        lambda: generate(
            target.model,
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            custom_generate=loop,
            **options,
        )
    )
