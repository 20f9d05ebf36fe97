"""``python -m benchmarks beside``: a draft model that drafts while the target's passes run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import PromptOptions
from retrieval_draft.cli.options import Fields, Report, Table, measurement

__all__ = ["beside"]

KINDS = Path("tests/data/prompts_kinds.jsonl")


@measurement
def beside(
    prompts: Annotated[PromptOptions, Fields("prompts", "limit", defaults={"prompts": ()})],
    draft_model: Annotated[str, typer.Option(help='A model, or "int8", the target in int8.')] = "int8",
    model: Annotated[str, typer.Option(help="The target.")] = "gemma3-270m",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each reply.")] = 64,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Draft nodes of a step; without, the cost decides.")
    ] = None,
    lookups: Annotated[bool, typer.Option(help="Draft from lookups too.")] = True,
    depth: Annotated[int | None, typer.Option(min=1, help="Levels of the draft model's trees.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the target, and of the draft model.")] = 1,
) -> Report:
    """Compare drafts made before the target's passes with drafts made beside them."""
    import torch

    from benchmarks.beside import compare_beside
    from retrieval_draft.bench.provenance import provenance
    from retrieval_draft.models.loading import load_model

    torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model)
    result = compare_beside(
        loaded, tokenizer, prompts.read(KINDS), draft_model,
        max_new_tokens=max_new_tokens, nodes=nodes, lookups=lookups, depth=depth,
    )  # fmt: skip
    result |= {"model": model, "draft_model": draft_model, "nodes": nodes, "depth": depth, "threads": threads}
    rows = [
        (
            way,
            f"{each['tokens_per_step']:.2f}",
            f"{each['tokens_per_second']:.1f}",
            f"{each['pass_ms']:.0f}",
            f"{each['draft_ms']:.0f}",
        )
        for way, each in result["ways"].items()
    ]
    title = f"{model} with {draft_model}, {result['equal']} of {result['prompts']} texts equal"
    return Report(
        result,
        [
            Table(title, ("drafts", "tokens/step", "tokens/s", "ms a pass", "ms of drafts"), rows),
            f"beside to before: {result['ratio']:.2f}; {result['prepared']} passes prepared for, "
            f"{result['hits']:.0%} of them with the outcome that came",
        ],
        different=result["equal"] < result["prompts"],
        saved=result | provenance(),
    )
