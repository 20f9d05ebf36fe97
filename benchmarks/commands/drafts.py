"""``python -m benchmarks drafts``: round trips of the drafting service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.options import Report, Table, measurement

__all__ = ["drafts"]


@measurement
def drafts(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    nodes: Annotated[int, typer.Option(min=1, max=1024, help="Draft nodes of every step.")] = 60,
    pause: Annotated[
        float, typer.Option(min=0.0, help="Milliseconds between steps, in which an engine's model would run.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests.")] = None,
    together: Annotated[int, typer.Option(min=1, max=1024, help="Sessions in one call.")] = 64,
) -> Report:
    """Measure the drafting service: steps over TCP and a unix socket, and of many sessions in one call."""
    from benchmarks.draft_service import measure_draft_service

    result = measure_draft_service(traces, nodes=nodes, pause=pause, limit=limit, together=together)
    rows = [
        (f"{label}, {name}", *(f"{found[part]:.0f}" for part in ("p50", "p90", "p99")))
        for key, label in (
            ("step_us", "a step"),
            ("batch_us", f"steps of {together} sessions"),
            ("open_us", "opening a session"),
        )
        for name, found in result[key].items()
    ]
    alone = result["service_us"]
    rows.append(("a step without a network", *(f"{alone[part]:.0f}" for part in ("p50", "p90", "p99"))))
    title = f"{nodes} nodes, {result['steps']:,} steps"
    return Report(result, [Table(title, ("round trip", "p50 us", "p90 us", "p99 us"), rows)])
