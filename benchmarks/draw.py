"""Cost of drawing a token, relative to the forward pass before it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.teacher_forcing import reply_logits
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.engine.target import Target

__all__ = ["draw"]

CONTEXT = 256
ROUNDS = 5


def draw(model: Any, tokenizer: Any, prompt: Prompt, *, tokens: int = 64) -> dict[str, Any]:
    """Times draws from the model's own logits, alternating with forward passes of one and of eight tokens.

    Args:
        model: The target model.
        tokenizer: Its tokenizer.
        prompt: Its greedy continuation gives the rows to draw from.
        tokens: Number of rows.

    Returns:
        The object that ``bench draw --json`` prints: median milliseconds of a draw by its options, of passes
        over 1 or 8 tokens, and each draw's share of a pass over one token.
    """
    ids = prompt.encode(tokenizer)
    with torch.no_grad():
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        out = model.generate(torch.tensor([ids]), do_sample=False, **lengths)
        rows = reply_logits(model, ids, out[0, len(ids) :].tolist()).float().contiguous()
    temperature = TemperatureLogitsWarper(0.8)
    settings: dict[str, list[Any]] = {
        "temperature": [temperature],
        "temperature, top_k": [temperature, TopKLogitsWarper(50)],
        "temperature, top_p": [temperature, TopPLogitsWarper(0.9)],
        "temperature, min_p": [temperature, MinPLogitsWarper(0.05)],
        "temperature, top_k, top_p": [temperature, TopKLogitsWarper(50), TopPLogitsWarper(0.9)],
        "repetition_penalty, temperature": [RepetitionPenaltyLogitsProcessor(1.2), temperature],
    }
    noise = GumbelNoise(0, rows.shape[1], rows.device)
    times: dict[str, list[float]] = {name: [] for name in settings}
    passes: dict[int, list[float]] = {1: [], 8: []}
    kernels = CpuKernels(model)
    kernels.prepare()
    with torch.no_grad(), kernels.applied():
        forward = tree_passes(Target(model), CONTEXT)
        for turn in range(ROUNDS + 1):
            for size in passes:
                begin = time.perf_counter()
                forward(size)
                passes[size] += [time.perf_counter() - begin] * (turn > 0)
            for name, processors in settings.items():
                sampler = Sampler(LogitsProcessorList(processors), noise)
                for index, row in enumerate(rows):
                    text = torch.tensor([ids])
                    begin = time.perf_counter()
                    sampler.choose(row, text, index)
                    times[name] += [time.perf_counter() - begin] * (turn > 0)
    step = float(np.median(passes[1]))
    return {
        "draw_ms": {name: float(np.median(taken)) * 1e3 for name, taken in times.items()},
        "pass_ms": {size: float(np.median(taken)) * 1e3 for size, taken in passes.items()},
        "share_of_a_step": {name: float(np.median(taken)) / step for name, taken in times.items()},
        "vocabulary": rows.shape[1],
        "provenance": provenance(),
    }
