"""``python -m benchmarks automaton``, ``fusion``, ``loop``, ``passes``, ``cold``: single parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement

__all__ = ["automaton", "cold", "fusion", "loop", "passes"]


@measurement
def fusion(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    nodes: Annotated[int, typer.Option(min=1, help="Draft nodes of every step.")] = 60,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests.")] = 60,
) -> Report:
    """Time fusion, selection and calibration for five sources that propose in full."""
    from benchmarks.fusion import measure_fusion

    result = measure_fusion(traces, nodes=nodes, limit=limit)
    lines = [
        f"{name}: p50 {result[f'{name}_us']['p50']:.0f} us, p99 {result[f'{name}_us']['p99']:.0f} us"
        for name in ("fuse", "observe", "both")
    ]
    return Report(result, [*lines, f"{result['proposed']:.0f} nodes proposed, {result['steps']:,} steps"])


@measurement
def automaton(
    traces: Annotated[list[Path], typer.Argument(help="Trace files, for their text.", show_default=False)],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, by commas.")] = "8192,131072",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each proposal.")] = 60,
) -> Report:
    """Measure the suffix automaton: insertion, bytes a token, proposals at several context lengths."""
    from benchmarks.automaton import measure_automaton

    result = measure_automaton(traces, lengths=[int(length) for length in split(lengths)], nodes=nodes)
    rows = [
        (
            length,
            f"{found['insert_tokens_per_second'] / 1e6:.2f}M",
            f"{found['bytes_per_token']:.0f}",
            f"{found['propose_us']['p50']:.1f}",
            f"{found['propose_us']['p99']:.1f}",
            f"{found['nodes']:.1f}",
        )
        for length, found in result["lengths"].items()
    ]
    columns = ("context", "inserted/s", "bytes/token", "propose p50 us", "p99 us", "nodes")
    return Report(result, [Table("", columns, rows)])


@measurement
def loop(
    model: Annotated[str, typer.Option(help="Name or folder of a model, or small.")] = "gemma3-270m",
    nodes: Annotated[int, typer.Option(min=0, help="Draft nodes of a step; 0 for as many as pay.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply.")] = 32,
) -> Report:
    """Time what the loop does between two passes of greedy decoding, part by part."""
    from benchmarks.loop import measure_loop

    result = measure_loop(model, nodes=nodes or None, tokens=tokens)
    names = ("learn", "draft", "commit", "accept", "loop", "read", "pass")
    table = Table("", ("part", "us"), [(name, f"{result[f'{name}_us']:.0f}") for name in names])
    line = f"{result['steps']} steps of {result['nodes']:.1f} nodes; loop is all but read and pass"
    return Report(result, [table, line])


@measurement
def passes(
    model: Annotated[str, typer.Option(help="Model.")] = "gemma3-270m",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, by commas.")] = "1,4,8,16",
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each case.")] = 9,
) -> Report:
    """Time the parts of a pass on the CPU: head, matrices, attention, other stages, Python."""
    from benchmarks.pass_profile import PARTS, measure_pass
    from retrieval_draft.models.loading import load_model

    sizes = [int(size) for size in split(nodes)]
    loaded, _ = load_model(model, dtype=dtype)
    result: dict[str, Any] = {
        "model": model, "dtype": dtype, "milliseconds": measure_pass(loaded, sizes=sizes, rounds=rounds),
    }  # fmt: skip
    rows = [
        (name, *(f"{result['milliseconds'][size][name]:.1f}" for size in sizes)) for name in ("pass", *PARTS)
    ]
    return Report(result, [Table(f"{model}, {dtype}, ms", ("part", *map(str, sizes)), rows)])


@measurement
def cold(
    model: Annotated[str | None, typer.Option(help="Also prepare the CPU kernels for this model.")] = None,
    dtypes: Annotated[str, typer.Option(help="Of that model, one or more, by commas.")] = "float32",
) -> Report:
    """Measure the waits of a fresh install: import, compilation, and with --model the CPU kernels."""
    from benchmarks.cold import measure_cold, measure_first_use

    result = measure_cold()
    names = split(dtypes) if model is not None else []
    if model is not None:
        result["first_use"] = {name: measure_first_use(model, name) for name in names}
    imports, compiled, layers = (result[f"{name}_seconds"] for name in ("import", "compile", "layer"))
    rows = [
        ("import of torch and transformers", f"{imports['torch_and_transformers']:.2f}"),
        ("import of retrieval_draft after them", f"{imports['retrieval_draft']:.2f}"),
        ("first compilation", f"{compiled['first']:.1f}"),
        ("kernels from the cache", f"{compiled['cached']:.1f}"),
        ("first compilation of linear layers", f"{layers['first']:.1f}"),
        ("linear layers from the cache", f"{layers['cached']:.1f}"),
    ]
    for name in names:
        found = result["first_use"][name]
        rows += [
            (f"kernels for {model}, {name}, first time", f"{found['first_seconds']:.1f}"),
            (f"kernels for {model}, {name}, from then on", f"{found['again_seconds']:.2f}"),
        ]
    parts: list[Table | str] = [Table("", ("what", "seconds"), rows)]
    for name in names:
        found = result["first_use"][name]
        if found["stock_bytes"]:
            grown = (found["kernel_bytes"] - found["stock_bytes"]) / found["weight_bytes"]
            parts.append(f"{name}: our kernels add {grown:.1%} of the weights to resident memory")
    return Report(result, parts)
