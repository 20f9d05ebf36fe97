"""Comparison of llama-cpp-python without a draft model, with its own prompt lookup, and with ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.llama_cpp_noise import batch_noise
from retrieval_draft._progress import progress
from retrieval_draft.bench.measuring import ratio_summary, rotated
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.ties import compare
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.integrations.llama_cpp import RetrievalDraftModel
from retrieval_draft.integrations.llama_cpp._engine import llama_cpp
from retrieval_draft.proposer import Proposer

__all__ = ["CONTENDERS", "measure_llama_cpp"]

CONTENDERS = (
    "none",
    "lookup",
    "lookup-3x4",
    "lookup-2x3",
    "ours",
    "ours-10",
    "ours-history",
    "ours-history-10",
)
"""No drafts; `LlamaPromptLookupDecoding` with its defaults (n-grams up to 2, 10 tokens), and as
``lookup-NxM`` with n-grams up to N and M tokens; ours with the length that pays, and as ``-10`` with ten
each time; both without a history, and with one of the run's earlier prompts."""


class _Counting:
    """Counts the passes and draft tokens of a draft model."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.passes = self.drafted = 0

    def __call__(self, input_ids: Any, /, **options: Any) -> Any:
        drafted = self.inner(input_ids, **options)
        self.passes += 1
        self.drafted += len(drafted)
        return drafted


@dataclass
class _Contender:
    """A draft model, and the counts of the engine's runs with it.

    Attributes:
        drafts: The draft model; None without one.
        begin: Called before each prompt.
        end: Called after each prompt.
        passes: Passes over drafts or single tokens; the prompts' own do not count.
        drafted: Draft tokens verified.
        emitted: Tokens of replies but the first, which the prompt's pass yields.
        seconds: Of each reply, its prompt included.
        replies: Token ids.
    """

    drafts: _Counting | None = None
    begin: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None
    passes: int = 0
    drafted: int = 0
    emitted: int = 0
    seconds: list[float] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)


def measure_llama_cpp(
    path: str,
    prompts: Sequence[Prompt],
    *,
    contenders: Sequence[str] = CONTENDERS,
    max_new_tokens: int = 96,
    threads: int | None = None,
    context: int = 1024,
) -> dict[str, Any]:
    """Runs the contenders in turns prompt by prompt on one engine, greedily.

    The engine keeps the logits of all positions, as any draft model makes llama-cpp-python do, for "none" as
    well, so that the ratios show the gain of drafts.

    Args:
        path: A GGUF file.
        prompts: The prompts; those too long for the context are left out.
        contenders: Names of `CONTENDERS`, or ``lookup-NxM``; "none" is added.
        max_new_tokens: Of each reply at most.
        threads: Of the engine; None for its default.
        context: Tokens of text at most.

    Returns:
        By contender tokens per step, drafted tokens per step, ratio of speed to "none", and the number of
        replies equal to its; those that differ where the engine's own rounding, which depends on the batch,
        decides, are counted as ties.

    Raises:
        InvalidInputError: An unknown contender, or no prompt fits.
    """
    names = list(dict.fromkeys(["none", *contenders]))
    llama = llama_cpp().Llama(
        path,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        flash_attn=True,
        verbose=False,
    )
    made = {name: _make(name, llama) for name in names}
    encoded = [_encode(llama, prompt) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) + max_new_tokens < context]
    if not encoded:
        raise InvalidInputError(
            f"None of {len(prompts)} prompts fits into {context} tokens.", "Name other prompts."
        )
    with progress("Generating", len(encoded) * len(names)) as advance:
        for number, ids in enumerate(encoded):
            for name in rotated(names, number):
                _answer(llama, made[name], ids, max_new_tokens)
                advance()
    plain = made["none"]
    result: dict[str, Any] = {name: _summary(each, plain) for name, each in made.items()}
    for name, each in made.items():
        result[name] |= _compare(llama, each, plain, encoded)
    return {"contenders": result, "prompts": len(encoded), "max_new_tokens": max_new_tokens, "model": path}


def _make(name: str, llama: Any) -> _Contender:
    unknown = InvalidInputError(f"Unknown contender {name!r}.", f"Choose from: {', '.join(CONTENDERS)}.")
    if name == "none":
        return _Contender()
    if name.startswith("lookup"):
        ngram, _, tokens = (name.removeprefix("lookup").removeprefix("-") or "2x10").partition("x")
        if not (ngram.isdecimal() and tokens.isdecimal()):
            raise unknown
        lookup = llama_cpp().llama_speculative.LlamaPromptLookupDecoding(int(ngram), int(tokens))
        return _Contender(_Counting(lookup))
    if name not in CONTENDERS:
        raise unknown
    return _ours(name, llama)


def _ours(name: str, llama: Any) -> _Contender:
    """Makes ours. Without a history each prompt has a proposer of its own; only pass costs are kept."""
    remembers = "history" in name
    sources = tuple(source for source in SOURCES if remembers or source != "history")
    config, rows = DraftConfig(sources=sources), llama.n_vocab()

    def made() -> RetrievalDraftModel:
        proposer = Proposer.for_tokenizer(None, vocabulary=rows, config=config)
        return RetrievalDraftModel(proposer, num_pred_tokens=10 if name.endswith("-10") else None)

    counting = _Counting(made())
    counting.inner.warm_up(llama)

    def begin() -> None:
        if not remembers:
            before = counting.inner
            counting.inner = made()
            counting.inner.costs = before.costs
            before.proposer.close()

    return _Contender(counting, begin, lambda: counting.inner.flush())


def _encode(llama: Any, prompt: Prompt) -> list[int]:
    if prompt.text is None:
        return list(prompt.ids)
    return list(llama.tokenize(prompt.text.encode(), add_bos=True, special=False))


def _answer(llama: Any, contender: _Contender, ids: list[int], most: int) -> None:
    contender.begin()
    drafts = llama.draft_model = contender.drafts
    llama.reset()
    if drafts is not None:
        drafts.passes = drafts.drafted = 0
    begin = time.perf_counter()
    reply = list(_tokens(llama, ids, most))
    contender.seconds.append(time.perf_counter() - begin)
    contender.replies.append(reply)
    contender.emitted += len(reply) - 1
    contender.passes += len(reply) - 1 if drafts is None else drafts.passes
    contender.drafted += 0 if drafts is None else drafts.drafted
    contender.end()


def _tokens(llama: Any, ids: list[int], most: int) -> Iterator[int]:
    end = llama.token_eos()
    for number, token in enumerate(llama.generate(ids, temp=0.0), 1):
        yield token
        if number == most or token == end:
            return


def _summary(contender: _Contender, plain: _Contender) -> dict[str, Any]:
    tokens = sum(len(reply) for reply in contender.replies)
    return {
        "tokens_per_step": contender.emitted / max(contender.passes, 1),
        "drafted_per_step": contender.drafted / max(contender.passes, 1),
        "tokens_per_second": tokens / sum(contender.seconds),
        "ratio": ratio_summary(_speeds(contender) / _speeds(plain)),
    }


def _speeds(contender: _Contender) -> NDArray[np.float64]:
    tokens = np.array([len(reply) for reply in contender.replies], np.float64)
    return tokens / np.array(contender.seconds, np.float64)


def _compare(
    llama: Any, contender: _Contender, plain: _Contender, prompts: Sequence[list[int]]
) -> dict[str, int]:
    """Numbers of replies that equal those without drafts, differ by rounding, or differ otherwise."""
    counts = {"equal": 0, "ties": 0, "different": 0}
    for ids, mine, stock in zip(prompts, contender.replies, plain.replies, strict=True):
        at = compare(stock, mine)
        if at is None or at in (len(mine), len(stock)):
            counts["equal" if at is None else "different"] += 1
            continue
        gap, noise = batch_noise(llama, [*ids, *stock[:at]], stock[at], mine[at])
        counts["ties" if gap <= noise else "different"] += 1
    return counts
