"""``retrieval-draft bench``: measurements on a user's own model, traces and corpora."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli import bench_datastores
from retrieval_draft.cli.common import (
    Beside,
    Chat,
    ModelOptions,
    PromptOptions,
    SourceOptions,
    ratio_range,
    split,
)
from retrieval_draft.cli.options import Fields, Report, Table, measurement
from retrieval_draft.config import DraftConfig

__all__ = ["app", "live_report"]


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Requests of traces, and how they are replayed.

    Attributes:
        history: Keep learned state between requests.
        part: all, even or odd requests; priors are fitted on even.
        limit: Only so many requests.
        corpora: A corpus index to draft from.
        prompt_tokens: Leave only so many tokens at the end of each prompt; those before become a reference
            text.
        references: Pass reference texts along.
    """

    history: Annotated[bool, typer.Option("--history/--no-history")] = True
    part: str = "all"
    limit: Annotated[int | None, typer.Option(min=1)] = None
    corpora: Annotated[tuple[Path, ...], typer.Option("--index")] = ()
    prompt_tokens: Annotated[int | None, typer.Option(min=0, show_default=False)] = None
    references: bool = True


app = typer.Typer(help="Measure.", pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("index")(bench_datastores.index)
app.command("corpus")(bench_datastores.corpus)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("live")
@measurement
def live(
    model: Annotated[ModelOptions, Fields(...)],
    prompts: Annotated[
        PromptOptions,
        Fields(..., seed=typer.Option(help="Draws the prompts, and random ids."), defaults={"prompts": ()}),
    ],
    config: Annotated[DraftConfig, Fields("nodes", cpu_kernels="--cpu-kernels/--stock-kernels")],
    sources: Annotated[SourceOptions, Fields("corpora")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each reply at most.")] = 96,
    methods: Annotated[
        str,
        typer.Option(
            help="stock, stock-pld (prompt lookup), stock-compiled and drafting methods, by commas; "
            "-no-cudnn after a name turns cuDNN's attention off."
        ),
    ] = "stock,stock-pld,none,calibrated",
    random_ids: Annotated[
        int | None, typer.Option(min=1, help="So many prompts of random ids instead of files.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Ids in each random prompt.")] = 256,
    record: Annotated[
        Path | None, typer.Option(help="Write stock's replies as a trace (.jsonl.gz).", show_default=False)
    ] = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Draft from earlier prompts of the run too.")
    ] = True,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help='Drafts too; "self": with layers skipped; "int8": its copy; "mtp": by its own layers for it.'
        ),
    ] = None,
    chat: Chat = False,
    beside: Beside = 0,
) -> Report:
    """Compare decoding methods on a model: speed, tokens per step, and equality of the text."""
    if not prompts.prompts and random_ids is None:
        raise typer.BadParameter("name a file, or use --random-ids", param_hint="--prompts")
    model.check()  # before torch, whose import takes seconds
    from retrieval_draft.bench.busy import busy_processes
    from retrieval_draft.bench.live import live as run
    from retrieval_draft.bench.prompts import random_prompts

    names = split(methods)
    chosen = [] if random_ids is not None else prompts.read()
    loaded, tokenizer = model.load()
    if random_ids is not None:
        special = tokenizer.all_special_ids
        chosen = random_prompts(random_ids, prompt_length, len(tokenizer), special, prompts.seed)
    with busy_processes(beside):
        result = run(
            loaded,
            tokenizer,
            chosen,
            max_new_tokens=max_new_tokens,
            methods=names,
            nodes=config.nodes,
            record=record,
            cpu_kernels=config.cpu_kernels,
            history=history,
            corpora=sources.corpora,
            draft_model=draft_model,
            chat=chat,
        )
    result |= {"model": model.model, "weights": model.weights, "beside": beside}
    return live_report(result)


@app.command("replay")
@measurement
def replay(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    options: Annotated[ReplayOptions, Fields(...)],
    nodes: Annotated[int, typer.Option(min=0, help="Draft nodes of every step.")] = 60,
    sources: Annotated[str, typer.Option(help="Only these sources, by commas.", show_default=False)] = "",
    method: Annotated[str, typer.Option(help="A drafting method.")] = "calibrated",
    without: Annotated[
        str, typer.Option(help="Evidence not to learn from: length,depth,rank,absent,request,cells.")
    ] = "",
    priors: Annotated[bool, typer.Option(help="Start from the shipped calibration.")] = True,
    oracle: Annotated[bool, typer.Option(help="Verify the best single source of each step instead.")] = False,
    late: Annotated[bool, typer.Option(help="Learn from a step after the next drafts, as on a GPU.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw predicted against observed acceptance.", show_default=False)
    ] = None,
) -> Report:
    """Replay recorded replies without a model: tokens that each step would have yielded."""
    from retrieval_draft.bench.reliability import plot_reliability
    from retrieval_draft.bench.replay import replay as run

    result = run(
        traces,
        nodes=nodes,
        sources=split(sources) or None,
        method=method,
        without=split(without),
        priors=priors,
        oracle=oracle,
        late=late,
        **asdict(options),
    )
    if plot is not None:
        if "calibration" not in result:
            raise typer.BadParameter(f"{method} predicts no acceptance", param_hint="--plot")
        plot_reliability(result["calibration"], plot)
    rows = [(task, f"{value:.3f}") for task, value in sorted(result["by_task"].items())]
    shares = [
        (level, f"{count:,}", f"{result['accepted_by_level'].get(level, 0):,}")
        for level, count in result["drafted_by_level"].items()
    ]
    parts: list[Table | str] = [
        Table("", ("task", "tokens per step"), [*rows, ("all", f"{result['tokens_per_step']:.3f}")]),
        Table("", ("level", "drafted nodes", "accepted"), shares),
    ]
    if "calibration" in result:
        error, path_error = result["calibration"]["error"], result["calibration"]["path_error"]
        parts.append(f"expected calibration error: {error:.4f} of nodes, {path_error:.4f} of paths")
    for name in ("draft", "fuse", "observe"):
        times = result[f"{name}_us"]
        parts.append(f"{name}: p50 {times['p50']:.0f} us, p99 {times['p99']:.0f} us")
    return Report(result, parts)


@app.command("methods")
@measurement
def methods(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    options: Annotated[ReplayOptions, Fields(...)],
    nodes: Annotated[str, typer.Option(help="Draft nodes of every step, by commas.")] = "8,16,32,60",
    names: Annotated[str, typer.Option("--methods", help="Only these, by commas.", show_default=False)] = "",
) -> Report:
    """Replay with every method that needs no model, and with the best single source of each step."""
    from retrieval_draft._progress import progress
    from retrieval_draft.bench.compare import compare_methods, lookup_methods

    sizes = [int(word) for word in split(nodes)]
    chosen = split(names) or lookup_methods()
    with progress("Replaying", (len(chosen) + 1) * len(sizes)) as advance:
        result = compare_methods(
            traces,
            nodes=sizes,
            methods=chosen,
            progress=advance,
            **asdict(options),
        )
    used = result["nodes_per_step"]
    rows = [
        (name, *(f"{found[size]:.3f} ({used[name][size]:.1f})" for size in sizes))
        for name, found in result["methods"].items()
    ]
    parts: list[Table | str] = [
        Table("tokens per step (verified nodes)", ("method", *(f"{size} nodes" for size in sizes)), rows)
    ]
    if len(result["by_task"]) > 1:
        tasks = result["by_task"]
        by_task = [
            (name, *(f"{tasks[task][name][sizes[-1]]:.3f}" for task in tasks)) for name in result["methods"]
        ]
        parts.append(Table(f"tokens per step by task, {sizes[-1]} nodes", ("method", *tasks), by_task))
    for size, ratio in result["calibrated_to_best"].items():
        parts.append(f"{size} nodes: calibrated is {ratio:.3f} times the best other method")
    return Report(result, parts)


@app.command("forward")
@measurement
def forward(
    model: Annotated[ModelOptions, Fields("model", "device")],
    dtypes: Annotated[str, typer.Option(help="One or more, by commas, measured in turn.")] = "float32",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each case.")] = 7,
    beside: Beside = 0,
) -> Report:
    """Measure t(n), a forward pass over n tokens: stock kernels, ours, and the machine's limit."""
    model.check()  # before torch, whose import takes seconds
    from retrieval_draft.bench.busy import busy_processes
    from retrieval_draft.bench.forward import SIZES, measure_forward

    names = split(dtypes)
    if not names:
        raise typer.BadParameter("name one", param_hint="--dtypes")
    models = [replace(model, dtype=name).load()[0] for name in names]
    with busy_processes(beside):
        results = measure_forward(models, context=context, rounds=rounds)
    for result in results:
        result |= {"model": model.model, "beside": beside}
    result = results[0] | {"by_dtype": {each["dtype"]: each for each in results[1:]}}
    parts = []
    for each in results:
        ours, stock, limit = (part["milliseconds"] for part in (each, each["stock"], each["limit"]))
        rows = [
            (
                str(n),
                f"{limit[n]:.0f}",
                f"{ours[n]:.0f}",
                f"{stock[n]:.0f}",
                f"{stock[n] / ours[n]:.2f}",
                f"{ours[n] / ours[1]:.2f}",
            )
            for n in SIZES
        ]
        title = (
            f"{model.model}, {each['device']}, {each['dtype']}, {each['threads']} threads, "
            f"{context} tokens in the cache; reads {each['read_gb_per_second']:.1f} GB/s, "
            f"multiplies at {each['sgemm_gflop_per_second']:.0f} GFLOP/s"
        )
        columns = ("tokens", "limit ms", "ours ms", "stock ms", "stock / ours", "ours / ours(1)")
        parts.append(Table(title, columns, rows))
    return Report(result, parts)


def live_report(result: dict[str, Any], titles: Mapping[str, str] | None = None) -> Report:
    """The report of `bench live`; ``titles`` replaces names of methods in its tables."""
    titles = titles or {}
    rows: list[tuple[str, ...]] = []
    for name, entry in result["methods"].items():
        share = entry["loop_share"]
        equal = entry["equal_to_stock"]
        rows.append(
            (
                titles.get(name, name),
                f"{entry['tokens_per_second']:.1f}",
                f"{entry['tokens_per_step']:.2f}",
                f"{entry['nodes_per_step']:.1f}",
                ratio_range(entry["ratio_to_stock"]),
                ratio_range(entry["ratio_to_none"]),
                "" if equal is None else f"{equal} + {entry['near_ties']} ties of {result['prompts']}",
                "" if share is None else f"{share:.1%}",
            )
        )
    columns: tuple[str, ...] = (
        "method",
        "tokens/s",
        "tokens/step",
        "nodes/step",
        "to stock (p10..p90)",
        "to none (p10..p90)",
        "same text",
        "loop",
    )
    if all(entry["ratio_to_none"] is None for entry in result["methods"].values()):
        at = columns.index("to none (p10..p90)")
        columns, rows = columns[:at] + columns[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
    title = f"{result['model']}, {result['device']}, {result['dtype']}, greedy, {result['prompts']} prompts"
    parts = [Table(title, columns, rows)]
    if len(result["by_task"]) > 1:
        by_task = [
            (task, str(entries[name]["prompts"]), *map(_steps_and_ratio, entries.values()))
            for task, entries in result["by_task"].items()
        ]
        title = "tokens per step by task (median speed against stock)"
        names = [titles.get(name, name) for name in result["methods"]]
        parts.append(Table(title, ("task", "prompts", *names), by_task))
    return Report(result, parts, different=any(entry["different"] for entry in result["methods"].values()))


def _steps_and_ratio(entry: dict[str, Any]) -> str:
    ratio = entry["ratio_to_stock"]
    return f"{entry['tokens_per_step']:.2f}" + ("" if ratio is None else f" ({ratio['median']:.2f}x)")
