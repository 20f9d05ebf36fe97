"""The logits processor that keeps a reply to a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from retrieval_draft.drafting.grammar.compiler import CompiledGrammar
from retrieval_draft.drafting.grammar.grammar_text import GrammarText

__all__ = ["GrammarProcessor", "start_grammar"]


class GrammarProcessor(LogitsProcessor):
    """Masks the tokens that a grammar forbids after the reply so far.

    It works in any loop of transformers that keeps the order of rows. A reply begins with the first call, and
    again with a call whose text does not continue that of the call before.

    Args:
        compiled: A grammar for each prompt, None for any text; or a single one for all of them.
    """

    def __init__(self, compiled: Sequence[CompiledGrammar | None]) -> None:
        self._compiled = list(compiled)
        self._texts: list[GrammarText | None] = []
        self._begin = 0
        self._ids: Tensor | None = None
        self._is_of_row = False

    def of_row(self, row: int, rows: int, begin: int) -> GrammarProcessor:
        """A processor for one row, at the beginning of its reply.

        Args:
            row: Index of the row.
            rows: Of the batch: the samples of each prompt one after the other.
            begin: Length of the prompt, padding included.
        """
        mine = GrammarProcessor([self._compiled[row * len(self._compiled) // rows]])
        mine._start(1, begin)
        mine._is_of_row = True
        return mine

    @property
    def text(self) -> GrammarText | None:
        """The reply of the only row that `of_row` made this for; None for any text."""
        (text,) = self._texts
        return text

    def _start(self, rows: int, begin: int) -> None:
        chosen = [self._compiled[row * len(self._compiled) // rows] for row in range(rows)]
        self._texts = [None if each is None else each.open() for each in chosen]
        self._begin, self._ids = begin, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, float, shape (rows, vocabulary), minus infinity for what is forbidden."""
        if not self._is_of_row:
            if not self._goes_on(input_ids):
                self._start(len(input_ids), input_ids.shape[1])
            self._ids = input_ids
        if all(text is None for text in self._texts):
            return scores
        replies = input_ids[:, self._begin :].to("cpu", torch.int32).numpy()
        forbidden = np.zeros(scores.shape, np.bool_)
        for row, text in enumerate(self._texts):
            if text is not None:
                text.follow(replies[row])
                bits = text.mask()
                if bits is not None:
                    allowed = np.unpackbits(bits, count=scores.shape[1], bitorder="little")
                    np.equal(allowed, 0, out=forbidden[row])
        return scores.masked_fill(torch.from_numpy(forbidden).to(scores.device), -torch.inf)

    def _goes_on(self, input_ids: Tensor) -> bool:
        known = self._ids
        return known is not None and torch.equal(input_ids[:, :-1], known)

    def __deepcopy__(self, memo: dict[int, Any]) -> GrammarProcessor:
        return GrammarProcessor(self._compiled)


def start_grammar(
    processors: Sequence[Any], row: int, rows: int, begin: int
) -> tuple[list[Any], GrammarText | None]:
    """Processors of a row with its own state of a grammar, and that state.

    Args:
        processors: Of `processors_of_row`.
        row: Index of the row.
        rows: Of the batch.
        begin: Length of the prompts, padding included.

    Returns:
        The processors; the state of the first grammar, None without any.
    """
    own = [
        each.of_row(row, rows, begin) if isinstance(each, GrammarProcessor) else each for each in processors
    ]
    texts = [each.text for each in own if isinstance(each, GrammarProcessor)]
    return own, next((text for text in texts if text is not None), None)
