"""Grammars among the arguments of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from retrieval_draft.drafting.grammar.compiler import compiler_of
from retrieval_draft.drafting.grammar.grammar import Grammar
from retrieval_draft.engine.sampling.grammar_processor import GrammarProcessor
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.streaming import effective

__all__ = ["Grammars", "grammar_processor", "take_grammar"]

Grammars = Grammar | Sequence[Grammar | None] | None
"""A grammar for all prompts, or one for each."""


def take_grammar(
    model: Any,
    tokenizer: Any,
    grammar: Grammars,
    prompts: Any,
    config: GenerationConfig | None,
    options: dict[str, Any],
) -> None:
    """Adds a grammar to the logits processors, after those of the caller.

    Args:
        model: Of transformers.
        tokenizer: The model's; one in `options` takes precedence.
        grammar: For all prompts, or a list of one for each, None for any text.
        prompts: int64, shape (batch, length), or None.
        config: The caller's.
        options: Keyword arguments for model.generate, changed in place.

    Raises:
        InvalidInputError: A grammar that cannot be followed, another number of them, or no tokenizer.
    """
    if grammar is None:
        return
    given = [grammar] if isinstance(grammar, Grammar) else list(grammar)
    wrong = [each for each in given if each is not None and not isinstance(each, Grammar)]
    if wrong:
        raise InvalidInputError(
            f"grammar is a {type(wrong[0]).__name__}; it must be a Grammar, or one for each prompt.",
            "Make one: Grammar.json_schema(schema).",
        )
    rows = len(prompts) if isinstance(prompts, Tensor) else 1
    if not isinstance(grammar, Grammar) and len(given) != rows:
        raise InvalidInputError(
            f"grammar has {len(given)} entries for {rows} prompts.", "Pass one for each, or a single one."
        )
    ends = effective(model, config, options, "eos_token_id")
    own = options.get("tokenizer") or tokenizer
    processor = grammar_processor(model, own, given, ends)
    others = options.get("logits_processor") or []
    options["logits_processor"] = LogitsProcessorList([*others, processor])


def grammar_processor(
    model: Any, tokenizer: Any, grammars: Sequence[Grammar | None], ends: Any
) -> GrammarProcessor:
    """The logits processor of grammars.

    Args:
        model: Of transformers.
        tokenizer: The model's.
        grammars: One for each prompt, or a single one for all of them.
        ends: Tokens that end a reply, as generation configurations name them.

    Raises:
        InvalidInputError: A grammar that cannot be followed, or no tokenizer.
    """
    if tokenizer is None:
        raise InvalidInputError(
            "A grammar needs a tokenizer.", "Pass tokenizer= to RetrievalDrafter.for_model, or to generate."
        )
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    eos = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    head = model.get_output_embeddings()
    width = int(head.weight.shape[0]) if head is not None else len(tokenizer)
    compiler = compiler_of(tokenizer, eos, width)
    return GrammarProcessor([None if each is None else compiler.compile(each) for each in grammars])
