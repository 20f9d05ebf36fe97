"""``python -m benchmarks llama_cpp``: our drafts under llama-cpp-python, against its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.bench_common import Out, finish, ratio_range, split
from retrieval_draft.cli.common import DIFFERENT, Json
from retrieval_draft.cli.output import print_json, print_table
from retrieval_draft.models.packaged import NAMES, PACKAGED, packaged_gguf

__all__ = ["llama_cpp"]


def llama_cpp(
    prompts: Annotated[
        list[Path],
        typer.Option("--prompts", help="JSON lines with prompt or turns; may be repeated."),
    ],
    model: Annotated[str, typer.Option(help=f"A GGUF file, {NAMES}.")] = "gemma3-270m",
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many prompts, taken in turn from every task.")
    ] = None,
    contenders: Annotated[
        str,
        typer.Option(
            help="none, lookup, lookup-NxM, ours, ours-10, ours-history, ours-history-10, by commas."
        ),
    ] = "none,lookup,lookup-3x4,lookup-2x3,ours,ours-10,ours-history,ours-history-10",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine.", show_default=False)] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of text at most.")] = 1024,
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare draft models of llama-cpp-python: tokens per step, speed, and equality of the text."""
    from benchmarks.llama_cpp import measure_llama_cpp
    from retrieval_draft.bench.prompts import read_prompts, spread

    read = read_prompts(prompts)
    path = str(packaged_gguf(model)) if model in PACKAGED else model
    result = measure_llama_cpp(
        path,
        read if limit is None else spread(read, limit),
        contenders=split(contenders),
        max_new_tokens=max_new_tokens,
        threads=threads,
        context=context,
    )
    finish(result, out)
    if json:
        print_json(result)
    else:
        rows = [
            (
                name,
                f"{each['tokens_per_step']:.2f}",
                f"{each['drafted_per_step']:.1f}",
                ratio_range(each["ratio"]),
                f"{each['equal']} + {each['ties']}"
                + (f", {each['different']} not" if each["different"] else ""),
            )
            for name, each in result["contenders"].items()
        ]
        titles = ("drafts", "tokens a step", "drafted a step", "speed against none", "equal + ties + others")
        print_table(f"{result['prompts']} prompts, {Path(path).name}", titles, rows)
    if any(each["different"] for each in result["contenders"].values()):
        raise typer.Exit(DIFFERENT)
