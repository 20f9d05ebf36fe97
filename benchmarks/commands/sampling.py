"""``python -m benchmarks batch``, ``samples`` and ``draw``: batches, many samples, and the cost of a draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli.bench_common import Out, finish, ratio_range, split
from retrieval_draft.cli.common import DIFFERENT, Device, Dtype, Json, Model, Nodes
from retrieval_draft.cli.output import print_json, print_table

__all__ = ["batch", "draw", "samples"]

Prompts = Annotated[
    list[Path],
    typer.Option("--prompts", help="JSON lines with prompt or turns; may be repeated.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(min=1, help="So many prompts, taken in turn from every task.")]
Tasks = Annotated[str, typer.Option(help="Only these tasks, by commas.", show_default=False)]


def _load(
    model: str, prompts: list[Path], limit: int | None, tasks: str, dtype: str, device: str | None
) -> Any:
    from retrieval_draft.bench.prompts import read_prompts, spread
    from retrieval_draft.models.loading import load_model

    chosen = spread(read_prompts(prompts), limit, split(tasks), 0)
    return (*load_model(model, dtype=dtype, device=device), chosen)


def batch(
    model: Model,
    prompts: Prompts,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    methods: Annotated[
        str, typer.Option(help="stock and drafting methods, by commas.")
    ] = "stock,none,calibrated",
    nodes: Nodes = None,
    limit: Limit = 16,
    tasks: Tasks = "",
    dtype: Dtype = "float32",
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare decoding methods on batches: speed, tokens per step, and correctness of each row."""
    from benchmarks.batch import batches as run

    loaded, tokenizer, chosen = _load(model, prompts, limit, tasks, dtype, device)
    result = run(
        loaded,
        tokenizer,
        chosen,
        rows=rows,
        max_new_tokens=max_new_tokens,
        methods=split(methods),
        nodes=nodes,
    )
    result["model"] = model
    finish(result, out)
    if json:
        print_json(result)
    else:
        print_table(
            f"{result['batches']} batches of {rows} rows, {max_new_tokens} new tokens, {model}",
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
    if any(entry["different"] for entry in result["methods"].values()):
        raise typer.Exit(DIFFERENT)


def samples(
    model: Model,
    prompts: Prompts,
    count: Annotated[int, typer.Option("--samples", min=1, help="Samples of each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    ways: Annotated[
        str, typer.Option(help="together, alone, alone_without_noise, plain; by commas.")
    ] = "alone,alone_without_noise,together",
    method: Annotated[str, typer.Option(help="A drafting method.")] = "calibrated",
    nodes: Nodes = 16,
    limit: Limit = 4,
    tasks: Tasks = "",
    seed: Annotated[int, typer.Option(help="Of all prompts.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Draw the same samples together and alone, drafts ranked by the noise or not: tokens per step."""
    from benchmarks.samples import samples as run

    loaded, tokenizer, chosen = _load(model, prompts, limit, tasks, dtype, device)
    result = run(
        loaded,
        tokenizer,
        chosen,
        count=count,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        nodes=nodes,
        seed=seed,
        ways=split(ways),
        method=method,
    )
    result["model"] = model
    finish(result, out)
    if json:
        print_json(result)
    else:
        print_table(
            f"{result['samples']} samples at temperature {temperature}, "
            f"{result['same_in_all_ways']} the same in all ways",
            ("way", "tokens", "steps", "tokens/step"),
            [
                (way, str(entry["tokens"]), str(entry["steps"]), f"{entry['tokens_per_step']:.3f}")
                for way, entry in result["ways"].items()
            ],
        )
    if result["same_in_all_ways"] != result["samples"]:
        raise typer.Exit(DIFFERENT)


def draw(
    model: Model,
    prompts: Prompts,
    tokens: Annotated[int, typer.Option(min=8, help="Rows of logits to draw from.")] = 64,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure the cost of drawing one token, by sampling options, against a forward pass."""
    from benchmarks.draw import draw as run

    loaded, tokenizer, chosen = _load(model, prompts, 1, "", dtype, device)
    result = run(loaded, tokenizer, chosen[0], tokens=tokens)
    result["model"] = model
    finish(result, out)
    if json:
        print_json(result)
        return
    print_table(
        f"One draw of {result['vocabulary']:,} ids; a pass over a token takes {result['pass_ms'][1]:.1f} ms",
        ("set", "ms", "share of a step"),
        [
            (name, f"{taken:.3f}", f"{result['share_of_a_step'][name]:.1%}")
            for name, taken in result["draw_ms"].items()
        ],
    )
