"""Grammars among the arguments of generate: for all prompts or one each, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from retrieval_draft import Grammar, RetrievalDrafter
from retrieval_draft.engine.sampling.grammar_processor import GrammarProcessor
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.grammars import grammar_processor, take_grammar
from tests.support.grammars import json_model, json_tokenizer
from tests.support.models import make
from tests.support.pages import blocks_of

PROMPTS = torch.tensor([[5, 6], [7, 8]], dtype=torch.int64)


def test_it_comes_last_among_the_processors() -> None:
    other = object()
    options: dict[str, Any] = {"logits_processor": [other]}
    take_grammar(json_model(), json_tokenizer(), Grammar.choice(["a"]), PROMPTS, None, options)
    first, last = options["logits_processor"]
    assert first is other
    assert isinstance(last, GrammarProcessor)
    untouched: dict[str, Any] = {}
    take_grammar(json_model(), None, None, PROMPTS, None, untouched)
    assert untouched == {}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ([Grammar.choice(["a"])], "1 entries for 2 prompts"),
        (["a", "b"], "it must be a Grammar"),
        (Grammar.rules("start: x"), "unknown name"),
    ],
)
def test_what_does_not_fit_is_refused(grammar: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        take_grammar(json_model(), json_tokenizer(), grammar, PROMPTS, None, {})


def test_a_grammar_needs_a_tokenizer_and_an_end() -> None:
    model = json_model()
    with pytest.raises(InvalidInputError, match="needs a tokenizer"):
        RetrievalDrafter.for_model(model).generate(PROMPTS, grammar=Grammar.choice(["a"]))
    endless = make("llama", vocab_size=len(json_tokenizer()))
    with pytest.raises(InvalidInputError, match="ends the reply"):
        take_grammar(endless, json_tokenizer(), Grammar.choice(["a"]), PROMPTS, None, {})
    take_grammar(endless, json_tokenizer(), Grammar.choice(["a"]), PROMPTS, None, {"eos_token_id": 0})
    for ends in (0, [0, 1], torch.tensor([0], dtype=torch.int64)):
        grammar_processor(endless, json_tokenizer(), [Grammar.choice(["a"])], ends)


def test_the_page_about_them_runs() -> None:
    """The block of docs/generation.md."""
    (block,) = [block for block in blocks_of("docs/generation.md") if block.kind == "run by"]
    tokenizer = json_tokenizer()
    drafter = RetrievalDrafter.for_model(json_model(), tokenizer)
    defined: dict[str, Any] = {"drafter": drafter, "inputs": {"input_ids": PROMPTS[:1]}}
    exec(block.text, defined)  # noqa: S102
    assert tokenizer.decode(defined["out"][0, 2:], skip_special_tokens=True) in ("yes", "no")
    first = drafter.generate(PROMPTS[:1], grammar=Grammar.json_schema(defined["schema"]), max_new_tokens=200)
    found = json.loads(tokenizer.decode(first[0, 2:], skip_special_tokens=True))
    assert found["kind"] in ("cat", "dog")
