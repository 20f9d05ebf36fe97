"""``python -m benchmarks heads``, ``trim``: draft models beside the lookups, and over fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import PromptOptions, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["heads", "trim"]

Prompts = Annotated[PromptOptions, Fields("prompts", "limit", defaults={"prompts": ()})]
KINDS = Path("tests/data/prompts_kinds.jsonl")


@measurement
def heads(
    prompts: Prompts,
    draft_model: Annotated[str, typer.Option(help='A head, a model, "self", or "int8", the target in int8.')],
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each reply.")] = 64,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Draft nodes of a step; without, the cost decides.")
    ] = None,
    ways: Annotated[str, typer.Option(help="Of lookups, head, both.")] = "lookups,head,both",
    chat: Annotated[bool, typer.Option(help="Put prompts into the chat template.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all prompts are decoded.")] = 1,
) -> Report:
    """Compare lookups alone, a head or draft model alone, and both, by kind of prompt."""
    from benchmarks.heads import WAYS, compare_heads
    from retrieval_draft.bench.provenance import provenance
    from retrieval_draft.models.loading import load_model

    chosen = split(ways)
    unknown = [way for way in chosen if way not in WAYS]
    if unknown or not chosen:
        raise InvalidInputError(f"--ways is {ways!r}.", f"Choose from: {', '.join(WAYS)}.")
    loaded, tokenizer = load_model(model)
    given = prompts.read(KINDS)
    result = compare_heads(
        loaded, tokenizer, given, draft_model,
        max_new_tokens=max_new_tokens, nodes=nodes, chat=chat, ways=chosen, rounds=rounds,
    )  # fmt: skip
    result |= {"model": model, "draft_model": draft_model, "nodes": nodes}
    rows = [
        (
            task,
            way,
            f"{each['tokens_per_step']:.2f}",
            f"{each['tokens_per_second']:.1f}",
            f"{each['ratio']:.3f} ({each['interval'][0]:.3f} to {each['interval'][1]:.3f})",
        )
        for task, ways_of in result["by_task"].items()
        for way, each in ways_of.items()
    ]
    title = f"{model} with {draft_model}, {result['equal']} of {result['prompts']} texts equal"
    asked = ", ".join(f"{way} {share:.0%}" for way, share in result["asked"].items() if way != "lookups")
    return Report(
        result,
        [
            Table(title, ("prompts", "drafts", "tokens/step", "tokens/s", "to lookups"), rows),
            f"asked in so many steps: {asked}",
        ],
        different=result["equal"] < result["prompts"],
        saved=result | provenance(),
    )


@measurement
def trim(
    prompts: Prompts,
    model: Annotated[str, typer.Option(help="Target and draft model.")] = "gemma3-270m",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each reply.")] = 64,
) -> Report:
    """Time a draft model's passes over its whole vocabulary and over a trimmed one; count tokens per step."""
    from benchmarks.heads import time_trim
    from retrieval_draft.bench.provenance import provenance
    from retrieval_draft.models.loading import load_model

    loaded, tokenizer = load_model(model)
    given = prompts.read(KINDS)
    ways = time_trim(loaded, tokenizer, given, max_new_tokens=max_new_tokens)
    result = {"model": model, "ways": ways}
    rows = [(name, f"{each['pass_ms']:.1f}", f"{each['tokens_per_step']:.2f}") for name, each in ways.items()]
    table = Table(f"{model} drafts for itself", ("vocabulary", "ms a pass", "tokens/step"), rows)
    return Report(result, [table], saved=result | provenance())
