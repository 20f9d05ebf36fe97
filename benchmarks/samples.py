"""Samples of one prompt: together against each alone, and drafts with the known noise against without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from retrieval_draft._progress import progress
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.errors import InvalidInputError

__all__ = ["WAYS", "samples"]

WAYS = ("alone", "alone_without_noise", "together", "plain")
"""Each sample in a call of its own with a drafter of its own; the same, drafts ranked without the noise; all
samples of a prompt in one call; and alone without drafts."""


def samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    count: int,
    temperature: float,
    max_new_tokens: int,
    nodes: int | None = 16,
    seed: int = 0,
    ways: Sequence[str] = WAYS[:3],
    method: str = "calibrated",
) -> dict[str, Any]:
    """Draws `count` samples of each prompt in several ways, the same ones in each.

    No state is kept from prompt to prompt, nor, alone, from sample to sample. Since drafts change no token,
    tokens per step differ by drafts only, not by the drawn tokens.

    Args:
        model: The target model.
        tokenizer: Its tokenizer.
        prompts: The prompts, in the order to run.
        count: Samples of each.
        temperature: Of all; neither top-k nor top-p.
        max_new_tokens: For each reply.
        nodes: Draft nodes of every step; None for the budget that the cost model chooses.
        seed: Of all prompts.
        ways: Names of `WAYS`.
        method: A drafting method.

    Returns:
        The object that ``bench samples --json`` prints: for each way tokens, steps and tokens per step; the
        number of samples that were equal in all ways.

    Raises:
        InvalidInputError: An unknown way, or no prompts.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not prompts or not ways:
        raise InvalidInputError(
            f"No such way to sample: {unknown[0]!r}." if unknown else "No prompts to run.",
            f"Choose from: {', '.join(WAYS)}.",
        )
    sources = tuple(name for name in DraftConfig().sources if name != "history")
    config = DraftConfig(method=method, nodes=nodes, sources=sources)
    totals = {way: DraftStats() for way in ways}
    same = 0
    with progress("Decoding (prompts)", len(prompts) * len(ways), delay=0.0) as advance:
        for prompt in prompts:
            ids = torch.tensor([prompt.encode(tokenizer)])
            options = {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": max_new_tokens,
                "do_sample": True,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
                "seed": seed,
            }
            replies: list[list[list[int]]] = []
            for way in ways:
                replies.append(_draw(model, tokenizer, ids, way, count, config, options, totals[way]))
                advance()
            same += sum(all(other[n] == replies[0][n] for other in replies) for n in range(count))
    return {
        "ways": {
            way: {"tokens": total.tokens, "steps": total.steps, "tokens_per_step": total.tokens_per_step}
            for way, total in totals.items()
        },
        "samples": count * len(prompts),
        "same_in_all_ways": same,
        "temperature": temperature,
        "nodes": nodes,
        "method": method,
        "max_new_tokens": max_new_tokens,
        "provenance": provenance(),
    }


def _draw(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    way: str,
    count: int,
    config: DraftConfig,
    options: dict[str, Any],
    total: DraftStats,
) -> list[list[int]]:
    if way == "plain":
        config = replace(config, method="none")
    elif way == "alone_without_noise":
        config = replace(config, known_noise=False)
    if way == "together":
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=config)
        out = drafter.generate(ids, num_return_sequences=count, **options)
        total.add(drafter.stats)
        return [_reply(row, ids, tokenizer) for row in out]
    replies = []
    for number in range(count):
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=config)
        replies.append(_reply(drafter.generate(ids, sample=number, **options)[0], ids, tokenizer))
        total.add(drafter.stats)
    return replies


def _reply(row: torch.Tensor, ids: torch.Tensor, tokenizer: Any) -> list[int]:
    """A reply up to its end, without the padding after it."""
    reply: list[int] = row[ids.shape[1] :].tolist()
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return reply[: next((index for index, token in enumerate(reply) if token in ends), len(reply))]
