"""Batches on a real model: speed and tokens per step, against model.generate on the same batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.bench.agreement import compare_outputs
from retrieval_draft.bench.decoders import STOCK
from retrieval_draft.bench.measuring import ratio_summary, rotated
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import InvalidInputError

__all__ = ["batches", "left_padded"]


def batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    rows: int,
    max_new_tokens: int,
    methods: Sequence[str],
    nodes: int | None = None,
) -> dict[str, Any]:
    """Decodes prompts greedily, so many at a time, with every method.

    Methods take turns on each batch, with another first one each time. Tokens a second are new tokens, up to
    each row's end, over the time of the whole call. A last batch that is not full is left out.

    Args:
        model: The target model.
        tokenizer: Its tokenizer.
        prompts: The prompts, in the order to run.
        rows: Of each batch.
        max_new_tokens: For each reply.
        methods: ``stock`` and names of drafting methods.
        nodes: Draft nodes of every step and row, or None for the budget that the cost model splits.

    Returns:
        The object that ``bench batch --json`` prints: for each method tokens a second, tokens and nodes a
        step and row, the ratio of its speed to stock's by batch, and the numbers of replies that equal those
        of ``stock`` for the prompt alone, or differ from them at a near tie.

    Raises:
        InvalidInputError: There is no full batch, or no method.
    """
    methods = list(dict.fromkeys(methods))
    groups = [prompts[begin : begin + rows] for begin in range(0, len(prompts) - rows + 1, rows)]
    if not groups or not methods:
        raise InvalidInputError(
            f"{len(prompts)} prompts make no batch of {rows} for {len(methods)} methods.",
            "Name more prompts, or a smaller --rows.",
        )
    drafters = {
        name: RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(method=name, nodes=nodes))
        for name in methods
        if name != STOCK
    }
    for drafter in drafters.values():
        drafter.warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    tokens: dict[str, list[int]] = {name: [] for name in methods}
    verdicts: dict[str, list[str]] = {name: [] for name in methods}
    total = len(groups) * (len(methods) + rows)
    with progress("Decoding (batches and replies)", total, delay=0.0) as advance:
        for number, group in enumerate(groups):
            encoded = [prompt.encode(tokenizer) for prompt in group]
            alone = []
            for ids in encoded:
                alone.append(_replies(model.generate, [ids], max_new_tokens, tokenizer)[0][0])
                advance()
            for name in rotated(methods, number):
                generate = model.generate if name == STOCK else drafters[name].generate
                replies, took = _replies(generate, encoded, max_new_tokens, tokenizer)
                seconds[name].append(took)
                tokens[name].append(sum(map(len, replies)))
                verdicts[name] += [
                    compare_outputs(model, ids, expected, reply)
                    for ids, expected, reply in zip(encoded, alone, replies, strict=True)
                ]
                advance()
    return {
        "methods": {
            name: {
                "tokens_per_second": sum(tokens[name]) / sum(seconds[name]),
                "tokens_per_step": drafters[name].stats.tokens_per_step if name in drafters else 1.0,
                "nodes_per_step": _nodes(drafters[name]) if name in drafters else 0.0,
                "ratio_to_stock": _ratio(name, seconds, tokens),
                "equal_to_stock_alone": verdicts[name].count("equal"),
                "near_ties": verdicts[name].count("tie"),
                "different": verdicts[name].count("different"),
            }
            for name in methods
        },
        "rows": rows,
        "batches": len(groups),
        "max_new_tokens": max_new_tokens,
        "nodes": nodes,
        "provenance": provenance(),
    }


def left_padded(encoded: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch: input_ids and attention_mask, int64, shape (rows, longest)."""
    width = max(map(len, encoded))
    ids = torch.zeros((len(encoded), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(encoded):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _replies(
    generate: Any, encoded: Sequence[Sequence[int]], max_new_tokens: int, tokenizer: Any
) -> tuple[list[list[int]], float]:
    """Each row's reply up to its end, and the seconds of the call."""
    ids, mask = left_padded(encoded)
    ends = {tokenizer.eos_token_id}
    begin = time.perf_counter()
    out = generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=list(ends), pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    took = time.perf_counter() - begin
    replies = []
    for reply in out[:, ids.shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(reply) if token in ends), len(reply))
        replies.append(reply[:end])
    return replies, took


def _nodes(drafter: RetrievalDrafter) -> float:
    return drafter.stats.drafted / max(drafter.stats.steps, 1)


def _ratio(
    name: str, seconds: dict[str, list[float]], tokens: dict[str, list[int]]
) -> dict[str, float] | None:
    if STOCK not in seconds:
        return None
    speeds = {each: np.array(tokens[each]) / np.array(seconds[each]) for each in (name, STOCK)}
    return ratio_summary(speeds[name] / speeds[STOCK])
