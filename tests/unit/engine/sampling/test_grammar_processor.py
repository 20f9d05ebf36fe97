"""The logits processor of grammars: rows that begin, go on and end apart from each other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from retrieval_draft import Grammar
from retrieval_draft.drafting.grammar.compiler import compiler_of
from retrieval_draft.engine.sampling.grammar_processor import GrammarProcessor, start_grammar
from tests.support.grammars import json_tokenizer

TOKENIZER = json_tokenizer()
EOS = TOKENIZER.eos_token_id
WIDTH = len(TOKENIZER) + 9


def processor(*texts: str | None) -> GrammarProcessor:
    compiler = compiler_of(TOKENIZER, [EOS], len(TOKENIZER))
    return GrammarProcessor(
        [None if text is None else compiler.compile(Grammar.choice([text])) for text in texts]
    )


def allowed(scores: Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in scores]


def after(made: GrammarProcessor, *rows: list[int]) -> list[list[int]]:
    ids = torch.tensor(rows, dtype=torch.int64)
    return allowed(made(ids, torch.zeros((len(rows), WIDTH), dtype=torch.float32)))


def test_each_row_follows_its_own_reply_and_a_new_text_begins_anew() -> None:
    made = processor("ZQ", "X", None)
    z, q, x = (TOKENIZER.encode(letter)[0] for letter in "ZQX")
    everything = list(range(WIDTH))
    for _ in range(2):
        assert after(made, [7], [7], [7]) == [[z], [x], everything]
        assert after(made, [7, z], [7, x], [7, 9]) == [[q], [EOS], everything]
        ended = after(made, [7, z, q], [7, x, EOS], [7, 9, 9])
        assert ended == [[EOS], everything, everything], (
            "the padded head is forbidden, until the reply is over"
        )


def test_rows_of_a_batch_have_copies_at_the_beginning() -> None:
    made = processor("ZQ", "X")
    z, x = (TOKENIZER.encode(letter)[0] for letter in "ZX")
    others: list[Any] = [object()]
    for row, token in ((0, z), (1, z), (2, x), (3, x)):
        own, text = start_grammar([*others, copy.deepcopy(made)], row, 4, 2)
        assert own[0] is others[0]
        assert text is own[1].text
        assert after(own[1], [5, 5]) == [[token]]
        assert after(own[1], [5, 5, token]) != [[token]]
    own, text = start_grammar([*others, processor(None)], 0, 1, 2)
    assert text is None
    assert len(after(own[1], [5, 5])[0]) == WIDTH
    assert start_grammar(others, 0, 1, 2) == (others, None)
