"""Times of the loop's own work in a step of greedy decoding, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.engine.decode import Batch, Step
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.models.loading import load_model

__all__ = ["PROMPTS", "SMALL", "measure_loop", "time_steps"]

SMALL = "small"
"""Name of a random model of one layer."""

PROMPTS = (
    "Explain why the sky is blue, and why sunsets are red.",
    "A story about a lighthouse keeper who finds a strange letter:",
    "def parse_config(path):\n    ",
    "Write a Python class for a binary search tree with insert, find and delete methods.",
)


def measure_loop(model: str, *, nodes: int | None = 16, tokens: int = 32) -> dict[str, Any]:
    """Decodes a few prompts without a history, after one that warms up.

    Args:
        model: Name or folder of a model; or `SMALL`, a model that leaves the caches to the loop, which shows
            what a pass over weights that fill them costs the loop after it.
        nodes: Draft nodes of a step; None for as many as pay.
        tokens: Of each reply.

    Returns:
        As `time_steps`.
    """
    loaded, tokenizer = (_small_model(), None) if model == SMALL else load_model(model)
    sources = tuple(name for name in SOURCES if name != "history")
    drafter = RetrievalDrafter.for_model(loaded, tokenizer, config=DraftConfig(nodes=nodes, sources=sources))
    drafter.warm_up()
    try:
        if tokenizer is None:
            prompts = [torch.arange(24)[None].repeat(1, 2) + 100 * number for number in range(len(PROMPTS))]
        else:
            prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        return time_steps(drafter, prompts, tokens)
    finally:
        drafter.close()


def _small_model() -> Any:
    """A random model of one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=2048
    )
    return LlamaForCausalLM(config).eval()


def time_steps(drafter: RetrievalDrafter, prompts: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    """Medians over the steps of all prompts; the first prompt is decoded once before.

    Args:
        drafter: Decodes them, greedily and past any end of text.
        prompts: int64, shape (1, length) each.
        tokens: Of each reply.

    Returns:
        ``{"steps", "nodes", "learn_us", "draft_us", "commit_us", "accept_us", "loop_us",
        "read_us", "pass_us"}``.
        The reading of logits is `read_us` and no part of `accept_us`; `loop_us` is all but that and the pass.
    """
    steps: list[tuple[Step, float]] = []
    reads = [0.0]
    read, step = LogitReader.read, Batch.step

    def timed_read(reader: LogitReader, logits: Tensor, *rest: Any) -> Predictions:
        begin = perf_counter()
        found = read(reader, logits, *rest)
        reads[0] += perf_counter() - begin
        return found

    def timed_step(batch: Batch) -> Step:
        reads[0] = 0.0
        done = step(batch)
        steps.append((done, reads[0]))
        return done

    with mock.patch.object(LogitReader, "read", timed_read), mock.patch.object(Batch, "step", timed_step):
        for number, prompt in enumerate([prompts[0], *prompts]):
            if number == 1:
                steps.clear()
            drafter.generate(input_ids=prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    rows = [
        {
            "learn": done.learn_seconds,
            "draft": done.draft_seconds,
            "commit": done.commit_seconds,
            "read": reading,
            "pass": done.forward_seconds,
            "loop": done.seconds - done.forward_seconds - reading,
        }
        for done, reading in steps
    ]
    for row in rows:
        row["accept"] = row["loop"] - row["learn"] - row["draft"] - row["commit"]
    drafted = sum(plan.tree.num_draft_tokens for done, _ in steps for plan in done.plans)
    found: dict[str, Any] = {"steps": len(steps), "nodes": drafted / len(steps)}
    return found | {f"{name}_us": 1e6 * median(row[name] for row in rows) for name in rows[0]}
