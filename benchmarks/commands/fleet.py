"""``python -m benchmarks fleet``: gains and costs of sharing in fleets of several sizes, by replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement

__all__ = ["fleet"]


@measurement
def fleet(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    servers: Annotated[str, typer.Option(help="Sizes of the fleet, by commas.")] = "4,16,64",
    nodes: Annotated[int, typer.Option(min=1, help="Draft nodes of every step.")] = 60,
    levels: Annotated[str, typer.Option(help="What is shared, by commas; all of it by default.")] = "",
    share: Annotated[str, typer.Option(help="Parts of a request that are shared: reply or all.")] = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests.")] = None,
) -> Report:
    """Replay traces over fleets that share nothing, texts, rows and calibration, against one server."""
    from benchmarks.fleet import LEVELS, measure_fleet

    sizes = [int(each) for each in split(servers)]
    chosen = split(levels) or list(LEVELS)
    result = measure_fleet(traces, servers=sizes, nodes=nodes, levels=chosen, share=share, limit=limit)
    columns = (
        "servers",
        "shared",
        "tokens per step",
        "of one server",
        "over requests seen",
        "bytes a request",
    )
    rows = [
        (
            str(found["servers"]),
            found["level"],
            f"{found['tokens_per_step']:.3f}",
            f"{found['ratio']:.4f}",
            " ".join(f"{value:.2f}" for _, value in found["curve"]),
            f"{found['text_bytes_per_request']:.0f} + {found['learned_bytes_per_request']:.0f}",
        )
        for found in ({**result["one_server"], "level": "one server", "ratio": 1.0}, *result["fleets"])
    ]
    return Report(result, [Table(f"{result['requests']} requests, {result['nodes']} nodes", columns, rows)])
