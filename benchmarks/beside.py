"""A draft model that drafts before the target's passes, and beside them: in turns, with equal threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.draft_models.choose import load_draft_model
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.foreign_draft import ForeignModelDraft
from retrieval_draft.engine.draft_models.model_draft import ModelDraft

__all__ = ["compare_beside"]

WAYS = ("before", "beside")


def compare_beside(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    draft_model: str,
    *,
    max_new_tokens: int = 64,
    nodes: int | None = None,
    lookups: bool = True,
    depth: int | None = None,
) -> dict[str, Any]:
    """Decodes each prompt in both ways, in turns, without text of earlier prompts.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        draft_model: Name of a model, or "int8".
        max_new_tokens: Of each reply.
        nodes: Draft nodes of each step; None for the budget by cost.
        lookups: Whether lookups draft too.
        depth: Levels of the draft model's trees; None for its own limit.

    Returns:
        ``{way: {"tokens_per_step", "tokens_per_second", "pass_ms", "draft_ms" of a step}}``; the median ratio
        of tokens a second, beside to before; passes beside which was drafted and the share whose outcome was
        prepared for; equal texts.
    """
    loaded = load_draft_model(draft_model, model)
    if depth is not None:
        limits = ExpansionLimits(depth=depth)
        if isinstance(loaded, tuple):
            loaded = ForeignModelDraft(loaded[0], loaded[1], tokenizer, limits=limits)
        else:
            loaded = ModelDraft(loaded, len(loaded.get_input_embeddings().weight), limits)
    sources = tuple(source for source in SOURCES if source != "history") if lookups else ()
    drafters = {
        way: RetrievalDrafter.for_model(
            model,
            tokenizer,
            config=DraftConfig(nodes=nodes, sources=sources, draft_beside=way == "beside"),
            draft_model=loaded,
        )
        for way in WAYS
    }
    for drafter in drafters.values():
        drafter.warm_up()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    equal = 0
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.encode(tokenizer)])
        texts = []
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            begin = time.perf_counter()
            out = drafters[way].generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
            rates[way].append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - begin))
            texts.append(out[0].tolist())
        equal += texts[0] == texts[1]
    thread = _thread(drafters["beside"])
    ratios = [after / before for before, after in zip(rates["before"], rates["beside"], strict=True)]
    return {
        "ways": {
            way: {
                "tokens_per_step": drafter.stats.tokens_per_step,
                "tokens_per_second": float(np.median(rates[way])),
                "pass_ms": 1e3 * drafter.stats.forward_seconds / drafter.stats.steps,
                "draft_ms": 1e3 * drafter.stats.draft_seconds / drafter.stats.steps,
            }
            for way, drafter in drafters.items()
        },
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "prepared": thread.prepared,
        "hits": thread.used / max(thread.prepared, 1),
        "prompts": len(prompts),
        "equal": equal,
    }


def _thread(drafter: RetrievalDrafter) -> Any:
    (model,) = drafter.context.models
    return getattr(model, "model", model).thread
