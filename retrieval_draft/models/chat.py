"""Conversations as token ids, by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["chat_inputs"]


def chat_inputs(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> Any:
    """Token ids of a conversation up to the start of the next reply.

    Args:
        tokenizer: One of transformers.
        messages: Each with ``role`` and ``content``; at least one.
        **options: Passed to ``apply_chat_template``, such as ``return_tensors``.

    Returns:
        A dictionary with ``input_ids`` and ``attention_mask``, as the tokenizer's own call returns it.

    Raises:
        InvalidInputError: There is no chat template, or it does not accept the messages.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise InvalidInputError(
            f"A chat needs a model with a chat template, and the tokenizer of {name!r} has none.",
            "Leave --chat out, or name an instruction-tuned model, such as smollm2-135m.",
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, **options
        )
    except Exception as error:  # any type: a template is a program of the model's authors
        raise InvalidInputError(
            f"The chat template of {name!r} does not accept these messages: {error}.",
            "Leave --chat out and write the prompt in the form that the model expects.",
        ) from error
