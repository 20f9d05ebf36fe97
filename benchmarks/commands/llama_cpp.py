"""``python -m benchmarks llama_cpp``: our drafts under llama-cpp-python, against its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import PromptOptions, ratio_range, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement
from retrieval_draft.models.packaged import NAMES, PACKAGED, packaged_gguf

__all__ = ["llama_cpp"]


@measurement
def llama_cpp(
    prompts: Annotated[PromptOptions, Fields("prompts", "limit")],
    model: Annotated[str, typer.Option(help=f"A GGUF file, {NAMES}.")] = "gemma3-270m",
    contenders: Annotated[
        str,
        typer.Option(
            help="none, lookup, lookup-NxM, ours, ours-10, ours-history, ours-history-10, by commas."
        ),
    ] = "none,lookup,lookup-3x4,lookup-2x3,ours,ours-10,ours-history,ours-history-10",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine.", show_default=False)] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of text at most.")] = 1024,
) -> Report:
    """Compare draft models of llama-cpp-python: tokens per step, speed, and equality of the text."""
    from benchmarks.llama_cpp import measure_llama_cpp
    from retrieval_draft.bench.prompts import read_prompts

    path = str(packaged_gguf(model)) if model in PACKAGED else model
    result = measure_llama_cpp(
        path,
        read_prompts(prompts.prompts) if prompts.limit is None else prompts.read(),
        contenders=split(contenders),
        max_new_tokens=max_new_tokens,
        threads=threads,
        context=context,
    )
    rows = [
        (
            name,
            f"{each['tokens_per_step']:.2f}",
            f"{each['drafted_per_step']:.1f}",
            ratio_range(each["ratio"]),
            f"{each['equal']} + {each['ties']}" + (f", {each['different']} not" if each["different"] else ""),
        )
        for name, each in result["contenders"].items()
    ]
    titles = ("drafts", "tokens a step", "drafted a step", "speed against none", "equal + ties + others")
    return Report(
        result,
        [Table(f"{result['prompts']} prompts, {Path(path).name}", titles, rows)],
        different=any(each["different"] for each in result["contenders"].values()),
    )
