"""``retrieval-draft bench index`` and ``bench corpus``: costs and gains of datastores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import ModelOptions, Nodes, ratio_range, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement

__all__ = ["corpus", "index"]


@measurement
def index(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the index.")] = 100_000_000,
    vocabulary: Annotated[int, typer.Option(min=16, help="Number of token ids.")] = 32000,
    workers: Annotated[int, typer.Option(min=1, help="Threads that sort.")] = 2,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each proposal.")] = 60,
    history_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the history; 0 for none.")
    ] = 10_000_000,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for temporary files; the system's by default.", show_default=False),
    ] = None,
) -> Report:
    """Measure datastores on synthetic text: build, open and look up an index, and a growing history."""
    from retrieval_draft.bench.datastores import measure_history, measure_index

    result = measure_index(tokens, vocabulary=vocabulary, workers=workers, nodes=nodes, folder=folder)
    if history_tokens:
        result["history"] = measure_history(history_tokens, vocabulary=vocabulary, nodes=nodes)
    large, small = result["lookup_us"], result["lookup_us_small"]
    rows = [
        ("built, tokens a second", f"{result['build_tokens_per_second'] / 1e6:.1f}M"),
        ("memory of the build, MB", f"{result['build_memory_bytes'] / 1e6:.0f}"),
        ("bytes a token on disk", f"{result['bytes_per_token']:.2f}"),
        ("opening, ms", f"{result['open_ms']:.1f}"),
        ("lookup and proposal, us: p50, p99", f"{large['p50']:.1f}, {large['p99']:.1f}"),
        (f"the same at {result['tokens_small']:,} tokens", f"{small['p50']:.1f}, {small['p99']:.1f}"),
    ]
    if history_tokens:
        found = result["history"]
        rows.append(("history, bytes a token", f"{found['bytes_per_token']:.2f}"))
        for name, what in (("", "alone"), ("_ingesting", "requests come in"), ("_evicting", "evicting")):
            times = found[f"step_us{name}"]
            values = f"{times['p50']:.0f}, {times['p99']:.0f}, {times['max']:.0f}"
            rows.append((f"history's part of a step, us: p50, p99, max, {what}", values))
        sizes = (found["resident_bytes"], found["resident_bytes_after_eviction"])
        if None not in sizes:
            rows.append(
                ("resident MB before and after eviction", " ".join(f"{size / 1e6:.0f}" for size in sizes))
            )
    title = f"{result['tokens']:,} tokens in {result['segments']} segments, {vocabulary:,} ids"
    return Report(result, [Table(title, ("what", "measured"), rows)])


@measurement
def corpus(
    model: Annotated[ModelOptions, Fields(..., without=("weights",))],
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="A code base. Python's standard library by default.", show_default=False),
    ] = None,
    include: Annotated[str, typer.Option(help="Globs of files to take, by commas.")] = "*.py",
    exclude: Annotated[str, typer.Option(help="Globs of files to leave out, by commas.")] = "",
    no_prompts: Annotated[
        str,
        typer.Option(help="Globs of files to index but cut no prompt from, by commas; stdlib: its tests."),
    ] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, each from a file of its own.")] = 30,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each.")] = 192,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    nodes: Nodes = None,
) -> Report:
    """Measure the gain of an index of a code base, on prompts cut from files it does not contain."""
    from retrieval_draft.bench.corpus import measure_corpus, standard_library

    chosen, left_out, tests = (paths, [], []) if paths else standard_library()
    loaded, tokenizer = model.load()
    result = measure_corpus(
        loaded,
        tokenizer,
        chosen,
        include=split(include),
        exclude=[*left_out, *split(exclude)],
        no_prompts=[*tests, *split(no_prompts)],
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        nodes=nodes,
    )
    result["model"] = model.model
    steps, speed = result["tokens_per_step"], result["speed_ratio"]
    rows = [
        ("tokens per step without the index", f"{steps['without']:.3f}"),
        ("with the index", f"{steps['with']:.3f}"),
        ("ratio", f"{result['ratio']:.3f}"),
        ("speed with / without, median (p10..p90)", ratio_range(speed)),
        ("same text", f"{result['equal']} of {result['prompts']}"),
    ]
    title = f"{result['index_tokens']:,} tokens indexed"
    return Report(result, [Table(title, ("what", "measured"), rows)])
