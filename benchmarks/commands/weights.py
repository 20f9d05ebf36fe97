"""``python -m benchmarks weights``: float32, int8 and int4 on the CPU, and llama.cpp's Q8_0."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.bench_common import Out, finish, split
from retrieval_draft.cli.common import Json, Model
from retrieval_draft.cli.output import print_json, print_table
from retrieval_draft.models.packaged import PACKAGED, packaged_gguf

__all__ = ["weights"]


def weights(
    model: Model,
    prompts: Annotated[
        list[Path],
        typer.Option("--prompts", help="JSON lines with prompt or turns; may be repeated."),
    ],
    weights: Annotated[str, typer.Option(help="float32, int8, int4, by commas.")] = "float32,int8",
    methods: Annotated[str, typer.Option(help="Drafting methods, by commas.")] = "none,calibrated",
    gguf: Annotated[
        Path | None,
        typer.Option(help="Q8_0 file for llama.cpp; made of a packaged model's, if it is not there."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 48,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many prompts, taken in turn from every task.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all engines.", show_default=False)] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare weights of few bits on the CPU: tokens a second, in turns."""
    from benchmarks.weights import measure_weights, quantize_gguf
    from retrieval_draft.bench.prompts import read_prompts, spread

    if gguf is not None and model in PACKAGED:
        quantize_gguf(packaged_gguf(model), gguf)
    result = measure_weights(
        model,
        spread(read_prompts(prompts), limit),
        weights=split(weights),
        methods=split(methods),
        gguf=gguf,
        max_new_tokens=max_new_tokens,
        threads=threads,
    )
    finish(result, out)
    if json:
        print_json(result)
        return
    rows = [
        (name, f"{found['median']:.1f}", f"{found['least']:.1f}", f"{found['most']:.1f}")
        for name, found in result["tokens_per_second"].items()
    ]
    titles = ("weights, method", "tokens/s, median", "least", "most")
    print_table(f"{model}, {result['threads']} threads", titles, rows)
