"""``python -m benchmarks batch``, ``samples`` and ``draw``: batches, many samples, and the cost of a draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from retrieval_draft.cli.common import ModelOptions, Nodes, PromptOptions, ratio_range, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement

__all__ = ["batch", "draw", "samples"]

Model = Annotated[ModelOptions, Fields(..., without=("weights",))]


@measurement
def batch(
    model: Model,
    prompts: Annotated[PromptOptions, Fields("prompts", "limit", "tasks", defaults={"limit": 16})],
    rows: Annotated[int, typer.Option(min=1, help="Rows of each batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    methods: Annotated[
        str, typer.Option(help="stock and drafting methods, by commas.")
    ] = "stock,none,calibrated",
    nodes: Nodes = None,
) -> Report:
    """Compare decoding methods on batches: speed, tokens per step, and correctness of each row."""
    from benchmarks.batch import batches as run

    result = run(
        *model.load(),
        prompts.read(),
        rows=rows,
        max_new_tokens=max_new_tokens,
        methods=split(methods),
        nodes=nodes,
    )
    result["model"] = model.model
    table = Table(
        f"{result['batches']} batches of {rows} rows, {max_new_tokens} new tokens, {model.model}",
        ("method", "tokens/s", "of stock (p10..p90)", "tokens/step", "nodes/step", "equal", "ties"),
        [
            (
                name,
                f"{entry['tokens_per_second']:.1f}",
                ratio_range(entry["ratio_to_stock"]),
                f"{entry['tokens_per_step']:.2f}",
                f"{entry['nodes_per_step']:.1f}",
                str(entry["equal_to_stock_alone"]),
                str(entry["near_ties"]),
            )
            for name, entry in result["methods"].items()
        ],
    )
    different = any(entry["different"] for entry in result["methods"].values())
    return Report(result, [table], different)


@measurement
def samples(
    model: Model,
    prompts: Annotated[
        PromptOptions,
        Fields("prompts", "limit", "tasks", seed=typer.Option(help="Of all prompts."), defaults={"limit": 4}),
    ],
    count: Annotated[int, typer.Option("--samples", min=1, help="Samples of each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    ways: Annotated[
        str, typer.Option(help="together, alone, alone_without_noise, plain; by commas.")
    ] = "alone,alone_without_noise,together",
    method: Annotated[str, typer.Option(help="A drafting method.")] = "calibrated",
    nodes: Nodes = 16,
) -> Report:
    """Draw the same samples together and alone, drafts ranked by the noise or not: tokens per step."""
    from benchmarks.samples import samples as run

    result = run(
        *model.load(),
        replace(prompts, seed=0).read(),
        count=count,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        nodes=nodes,
        seed=prompts.seed,
        ways=split(ways),
        method=method,
    )
    result["model"] = model.model
    table = Table(
        f"{result['samples']} samples at temperature {temperature}, "
        f"{result['same_in_all_ways']} the same in all ways",
        ("way", "tokens", "steps", "tokens/step"),
        [
            (way, str(entry["tokens"]), str(entry["steps"]), f"{entry['tokens_per_step']:.3f}")
            for way, entry in result["ways"].items()
        ],
    )
    return Report(result, [table], different=result["same_in_all_ways"] != result["samples"])


@measurement
def draw(
    model: Model,
    prompts: Annotated[PromptOptions, Fields("prompts", defaults={"limit": 1})],
    tokens: Annotated[int, typer.Option(min=8, help="Rows of logits to draw from.")] = 64,
) -> Report:
    """Measure the cost of drawing one token, by sampling options, against a forward pass."""
    from benchmarks.draw import draw as run

    result = run(*model.load(), prompts.read()[0], tokens=tokens)
    result["model"] = model.model
    table = Table(
        f"One draw of {result['vocabulary']:,} ids; a pass over a token takes {result['pass_ms'][1]:.1f} ms",
        ("set", "ms", "share of a step"),
        [
            (name, f"{taken:.3f}", f"{result['share_of_a_step'][name]:.1%}")
            for name, taken in result["draw_ms"].items()
        ],
    )
    return Report(result, [table])
