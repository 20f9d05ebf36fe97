"""Logits processors of a batch, for one row of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

__all__ = ["processors_of_row"]


def processors_of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Processors that see one row only, and say of it what those of the batch would.

    Rows do not advance together, so each has its own copies: what a processor remembers of a text stays with
    that text. What model.generate prepared for the whole batch is cut to the row.

    Args:
        processors: As model.generate prepared them.
        row: Which row.
        rows: Of the batch.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_of_row(processor, row) for processor in processors])


def _of_row(processor: Any, row: int) -> Any:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), 1)
    mine = copy.copy(processor)
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, Tensor) and len(ignored) > 1:
            mine.prompt_ignore_length = ignored[row : row + 1]
    return mine
