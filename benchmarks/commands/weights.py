"""``python -m benchmarks weights``: float32, int8 and int4 on the CPU, and llama.cpp's Q8_0."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import ModelOptions, PromptOptions, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement
from retrieval_draft.models.packaged import PACKAGED, packaged_gguf

__all__ = ["weights"]


@measurement
def weights(
    model: Annotated[ModelOptions, Fields("model")],
    prompts: Annotated[PromptOptions, Fields("prompts", "limit")],
    weights: Annotated[str, typer.Option(help="float32, int8, int4, by commas.")] = "float32,int8",
    methods: Annotated[str, typer.Option(help="Drafting methods, by commas.")] = "none,calibrated",
    gguf: Annotated[
        Path | None,
        typer.Option(help="Q8_0 file for llama.cpp; made of a packaged model's, if it is not there."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 48,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all engines.", show_default=False)] = None,
) -> Report:
    """Compare weights of few bits on the CPU: tokens a second, in turns."""
    from benchmarks.weights import measure_weights, quantize_gguf

    if gguf is not None and model.model in PACKAGED:
        quantize_gguf(packaged_gguf(model.model), gguf)
    result = measure_weights(
        model.model,
        prompts.read(),
        weights=split(weights),
        methods=split(methods),
        gguf=gguf,
        max_new_tokens=max_new_tokens,
        threads=threads,
    )
    rows = [
        (name, f"{found['median']:.1f}", f"{found['least']:.1f}", f"{found['most']:.1f}")
        for name, found in result["tokens_per_second"].items()
    ]
    titles = ("weights, method", "tokens/s, median", "least", "most")
    return Report(result, [Table(f"{model.model}, {result['threads']} threads", titles, rows)])
