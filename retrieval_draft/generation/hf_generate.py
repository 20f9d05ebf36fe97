"""Preparation of requests by model.generate, so that its options keep their meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from retrieval_draft.engine.target import Target
from retrieval_draft.engine.threads import in_live_pool
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.checks import check_new_tokens, check_options, check_prompt
from retrieval_draft.generation.streaming import effective, heal_tokens, take_stop_strings

__all__ = ["Decode", "through_model"]

Decode = Callable[[Tensor, LogitsProcessorList, StoppingCriteriaList, GenerationConfig, dict[str, Any]], Any]
"""Prompts, logits processors, stopping criteria, configuration and model inputs, all as prepared."""


def through_model(
    target: Target,
    tokenizer: Any,
    decode: Decode,
    input_ids: Any,
    attention_mask: Tensor | None,
    config: GenerationConfig | None,
    options: dict[str, Any],
) -> Any:
    """Checks the options, has model.generate prepare them, and returns the result of `decode`.

    Args:
        target: The model.
        tokenizer: For stop strings and token healing; one in `options` takes precedence.
        decode: Replaces model.generate's own loop.
        input_ids: Integers, shape (batch, length); None to begin with the bos token.
        attention_mask: 0 and 1, shape (batch, length). Zeros mark left padding; None for no padding.
        config: The caller's.
        options: Keyword arguments for model.generate, changed in place.

    Raises:
        RetrievalDraftError: An option or a prompt that cannot be used.
    """
    model: Any = target.model
    check_new_tokens(config, options)
    check_options(options)
    if input_ids is not None:
        check_prompt(input_ids, attention_mask)
    elif effective(model, config, options, "bos_token_id") is None:
        raise InvalidInputError(
            "There is no prompt, and no bos token to begin with.", "Pass input_ids, or bos_token_id."
        )
    tokenizer = options.pop("tokenizer", None) or tokenizer
    config = take_stop_strings(model, config, options, tokenizer)
    input_ids, config = heal_tokens(model, input_ids, config, options, tokenizer)

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
    return in_live_pool(
        lambda: type(model).generate(
            model,
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            custom_generate=loop,
            **options,
        )
    )
