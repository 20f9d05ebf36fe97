"""Decoding speed with float32, int8 and int4 weights on the CPU, and of llama.cpp, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retrieval_draft._progress import progress
from retrieval_draft.bench.decoders import make_contestant
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.models.loading import load_model

__all__ = ["measure_weights", "quantize_gguf"]

LLAMA = "llama.cpp"
_WARM_UP = "The first reply compiles kernels and measures them."


def measure_weights(
    model: str,
    prompts: Sequence[Prompt],
    *,
    weights: Sequence[str],
    methods: Sequence[str],
    gguf: Path | None = None,
    max_new_tokens: int = 48,
    threads: int | None = None,
) -> dict[str, Any]:
    """Decodes every prompt with every weights and method in turns, and by llama.cpp.

    Args:
        model: As for `load_model`.
        prompts: The prompts.
        weights: "float32", "int8" and "int4".
        methods: Names of drafting methods, which draft from no earlier prompt.
        gguf: File of the same model for llama.cpp; None leaves it out.
        max_new_tokens: For each reply.
        threads: Of torch and of llama.cpp; None for those of torch.

    Returns:
        Tokens a second, prompts' passes included, by weights and method: median, least and most over the
        replies. Each prompt is decoded once, as drafts are made of what was replied before.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    run: dict[str, Callable[[list[int]], tuple[int, float]]] = {}
    for each in weights:
        loaded, tokenizer = load_model(model, device="cpu", weights=None if each == "float32" else each)
        for method in methods:
            decoder = make_contestant(method, loaded, tokenizer, None)
            run[f"{each} {method}"] = _ours(decoder, max_new_tokens)
    if gguf is not None:
        run[LLAMA] = _llama(gguf, max_new_tokens, threads)
    speeds: dict[str, list[float]] = {name: [] for name in run}
    for decode in run.values():
        decode(list(tokenizer(_WARM_UP)["input_ids"]))
    with progress("Decoding (replies)", len(prompts) * len(run), delay=0.0) as advance:
        for prompt in prompts:
            ids = list(prompt.encode(tokenizer))
            for name, decode in run.items():
                tokens, seconds = decode(ids)
                speeds[name].append(tokens / seconds)
                advance()
    return {
        "tokens_per_second": {
            name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for name, found in speeds.items()
        },
        "model": model,
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "threads": threads,
        "provenance": provenance(),
    }


def _ours(decoder: Any, most: int) -> Callable[[list[int]], tuple[int, float]]:
    def decode(ids: list[int]) -> tuple[int, float]:
        found = decoder.generate(ids, most)
        return len(found.tokens), found.seconds

    return decode


def _llama(gguf: Path, most: int, threads: int) -> Callable[[list[int]], tuple[int, float]]:
    from retrieval_draft.integrations.llama_cpp._engine import llama_cpp

    engine = llama_cpp().Llama(
        str(gguf), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    end = engine.token_eos()

    def decode(ids: list[int]) -> tuple[int, float]:
        engine.reset()
        begin, count = time.perf_counter(), 0
        for token in engine.generate(ids, temp=0.0, repeat_penalty=1.0):
            count += 1
            if count == most or token == end:
                break
        return count, time.perf_counter() - begin

    return decode


def quantize_gguf(source: Path, target: Path) -> None:
    """Writes a GGUF file with weights of Q8_0, if it is not there.

    Args:
        source: GGUF file of any quantisation.
        target: The new file.
    """
    import ctypes

    from retrieval_draft.integrations.llama_cpp._engine import llama_cpp

    if target.exists():
        return
    low = llama_cpp().llama_cpp
    options = low.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = low.LLAMA_FTYPE_MOSTLY_Q8_0, True
    if low.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp did not write {target}")
