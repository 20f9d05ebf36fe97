"""Lookups alone, a head or draft model alone, and both: tokens per step and a second by kind of prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.draft_models.choose import is_self, load_draft_model

__all__ = ["WAYS", "compare_heads", "time_trim"]

WAYS = ("lookups", "head", "both")

RESAMPLED = 2000
"""Samples of the ratios, with replacement, of which the interval of their median is taken (95%)."""


def compare_heads(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    draft_model: Any,
    *,
    max_new_tokens: int = 64,
    nodes: int | None = None,
    chat: bool = False,
    ways: Sequence[str] = WAYS,
    rounds: int = 1,
) -> dict[str, Any]:
    """Decodes each prompt in each way, in turns, without text of earlier prompts.

    Each round has new drafters, which have learned nothing yet.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        prompts: The prompts, each with its task.
        draft_model: As for `RetrievalDrafter.for_model`.
        max_new_tokens: Of each reply.
        nodes: Draft nodes of each step; None for the budget by cost, with which a head may sleep.
        chat: Whether prompts are put into the chat template.
        ways: Of `WAYS`.
        rounds: Times that all prompts are decoded.

    Returns:
        ``{"by_task": {task or "all": {way: {"tokens_per_step", "tokens_per_second", "ratio" of tokens a
        second to lookups, median of prompts and rounds, "interval": that of the median}}}, "asked": {way:
        share of steps in which the head was}, "prompts": count, "equal": those whose texts all are}``.
    """
    if isinstance(draft_model, str) and not is_self(draft_model):
        draft_model = load_draft_model(draft_model, model)
    lookups = tuple(source for source in SOURCES if source != "history")
    runs: dict[str, dict[str, list[Any]]] = {}
    asked = {way: np.zeros(2, np.int64) for way in ways}
    different = set()
    for begun in range(rounds):
        drafters = {
            way: RetrievalDrafter.for_model(
                model,
                tokenizer,
                config=DraftConfig(nodes=nodes, sources=() if way == "head" else lookups),
                draft_model=None if way == "lookups" else draft_model,
            )
            for way in ways
        }
        for drafter in drafters.values():
            drafter.warm_up()
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.encode(tokenizer, chat)])
            texts = []
            for turn in range(len(ways)):
                way = ways[(begun + number + turn) % len(ways)]
                begin = time.perf_counter()
                out = drafters[way].generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
                seconds = time.perf_counter() - begin
                texts.append(out[0].tolist())
                for task in (prompt.task, "all"):
                    runs.setdefault(task, {}).setdefault(way, []).append((drafters[way].last_stats, seconds))
            if any(text != texts[0] for text in texts):
                different.add(number)
        for way, drafter in drafters.items():
            asked[way] += _asked(drafter)
            drafter.close()
    return {
        "by_task": {task: {way: _summary(each, way) for way in ways} for task, each in runs.items()},
        "asked": {way: float(calls / max(int(steps), 1)) for way, (calls, steps) in asked.items()},
        "prompts": len(prompts),
        "equal": len(prompts) - len(different),
    }


def _asked(drafter: RetrievalDrafter) -> tuple[int, int]:
    """Steps in which a draft model was asked, and all of them."""
    pacers = [each.pacer for each in drafter.draft_engine.sources if hasattr(each, "pacer")]
    return sum(pacer.calls for pacer in pacers), drafter.stats.steps


def _summary(runs: dict[str, list[Any]], way: str) -> dict[str, Any]:
    mine = runs[way]
    tokens, steps = (sum(getattr(stats, name) for stats, _ in mine) for name in ("tokens", "steps"))
    base = runs.get("lookups", mine)
    ratios = np.array(
        [
            (stats.tokens / seconds) / (other.tokens / others)
            for (stats, seconds), (other, others) in zip(mine, base, strict=True)
        ]
    )
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLED, len(ratios)))
    return {
        "tokens_per_step": (tokens - len(mine)) / max(steps, 1),
        "tokens_per_second": tokens / sum(seconds for _, seconds in mine),
        "ratio": float(np.median(ratios)),
        "interval": np.quantile(np.median(drawn, 1), (0.025, 0.975)).tolist(),
    }


def time_trim(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 64
) -> dict[str, Any]:
    """A model that drafts for itself, with all tokens and with some: time of a draft pass, tokens per step.

    Args:
        model: Target and draft model.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        max_new_tokens: Of each reply.

    Returns:
        ``{"whole" and "trimmed": {"pass_ms": median of passes over 8 nodes, "tokens_per_step"}}``.
    """
    from retrieval_draft.engine.draft_models.model_draft import ModelDraft
    from retrieval_draft.engine.passes import tree_passes

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    drafts = {"whole": ModelDraft(model, vocabulary, columns=0), "trimmed": ModelDraft(model, vocabulary)}
    out: dict[str, Any] = {name: {} for name in drafts}
    for name, draft in drafts.items():
        drafter = RetrievalDrafter.for_model(
            model, tokenizer, config=DraftConfig(nodes=6, sources=()), draft_model=draft
        )
        for prompt in prompts:
            ids = torch.tensor([prompt.encode(tokenizer)])
            drafter.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
        out[name]["tokens_per_step"] = drafter.stats.tokens_per_step
    times: dict[str, list[float]] = {name: [] for name in drafts}
    runs = {name: tree_passes(draft.target, 128) for name, draft in drafts.items()}
    for turn in range(12):
        for name, draft in drafts.items():
            trim = nullcontext() if draft.trims is None else draft.trims.of(None).applied()
            with draft.applied(), trim, torch.no_grad():
                begin = time.perf_counter()
                runs[name](8)
                if turn > 1:
                    times[name].append(time.perf_counter() - begin)
    for name, seconds in times.items():
        out[name]["pass_ms"] = float(np.median(seconds)) * 1e3
    return out
