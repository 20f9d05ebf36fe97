"""Logits processors and stopping criteria of a batch, for one row of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from retrieval_draft.errors import UnsupportedGenerationError

__all__ = ["criteria_of_row", "processors_of_row"]


def processors_of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Processors for one row only, with the results that those of the batch would have for it.

    Rows do not advance together, so each has its own copies: a processor's state of a text stays with that
    text. Arguments that model.generate prepared for the whole batch are cut to the row.

    Args:
        processors: As model.generate prepared them.
        row: Index of the row.
        rows: Of the batch.

    Raises:
        UnsupportedGenerationError: There are several rows, and one of the processors cannot be copied.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_of_row(processor, row, rows) for processor in processors])


def criteria_of_row(criteria: StoppingCriteriaList, rows: int) -> StoppingCriteriaList:
    """Stopping criteria that see one row only: copies, where there are several rows.

    Args:
        criteria: As model.generate prepared them.
        rows: Of the batch.

    Raises:
        UnsupportedGenerationError: There are several rows, and one of the criteria cannot be copied.
    """
    if rows == 1:
        return criteria
    return StoppingCriteriaList([each if _is_of_transformers(each) else _copied(each) for each in criteria])


def _of_row(processor: Any, row: int, rows: int) -> Any:
    kind = type(processor)
    if kind is PrefixConstrainedLogitsProcessor:
        allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(prompt, text), 1)
    # Those of transformers replace their state and never change it in place.
    mine = copy.copy(processor) if _is_of_transformers(processor) else _copied(processor)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, Tensor) and len(ignored) > 1:
            mine.prompt_ignore_length = ignored[row : row + 1]
    # These two were made from the prompts before each was repeated for its samples.
    if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        prompt = row // (rows // processor.batch_size)
        mine.batch_size, mine.generated_ngrams = 1, processor.generated_ngrams[prompt : prompt + 1]
    if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        prompt = row // (rows // len(processor.encoder_input_ids))
        mine.encoder_input_ids = processor.encoder_input_ids[prompt : prompt + 1]
    return mine


def _is_of_transformers(given: Any) -> bool:
    return type(given).__module__.partition(".")[0] == "transformers"


def _copied(given: Any) -> Any:
    """A copy that shares nothing mutable; models and tokenizers, which are only read, stay the same."""
    asked = {
        id(value): value
        for value in getattr(given, "__dict__", {}).values()
        if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
    }
    try:
        return copy.deepcopy(given, asked)
    except Exception as error:
        name = type(given).__name__
        raise UnsupportedGenerationError(
            f"{name} cannot be copied for each row of a batch: {type(error).__name__}: {error}",
            f"Give it a __deepcopy__, or generate the rows one by one with a {name} each.",
        ) from error
