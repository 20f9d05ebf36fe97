"""``python -m benchmarks chains``: drafts for whole batches, as for an engine such as vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["chains"]


@measurement
def chains(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(help="Recorded replies to replay as well, for tokens per step.", show_default=False),
    ] = None,
    requests: Annotated[str, typer.Option(help="Requests of each batch, by commas.")] = "1,8,64,256",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 4096,
    history_tokens: Annotated[int, typer.Option(min=0, help="Tokens of earlier requests.")] = 1_000_000,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each batch.")] = 200,
    max_chain: Annotated[int, typer.Option(min=1, max=256, help="The longest chain.")] = 16,
    min_prob: Annotated[float, typer.Option(min=0, max=1, help="Path probability that ends a chain.")] = 0.05,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads that propose.")] = 1,
    limit: Annotated[
        int | None, typer.Option(help="Replay only so many requests.", show_default=False)
    ] = None,
) -> Report:
    """Time drafting for batches on synthetic text: observing, learning and a chain for every request."""
    from benchmarks.chains import measure_chains, replay_chains

    try:
        sizes = [int(word) for word in split(requests)]
    except ValueError as error:
        raise InvalidInputError(f"--requests is {requests!r}.", "Pass numbers, such as 1,64.") from error
    if not sizes or min(sizes) < 1:
        raise InvalidInputError(f"--requests is {requests!r}.", "Pass numbers of 1 and above.")
    result = measure_chains(
        sizes,
        context=context,
        history_tokens=history_tokens,
        steps=steps,
        max_chain=max_chain,
        min_prob=min_prob,
        threads=threads,
    )
    if traces:
        result["replay"] = replay_chains(traces, max_chain=max_chain, min_prob=min_prob, limit=limit)
    rows = []
    for size, without in result["requests"].items():
        for name, found in (("none", without), (f"{history_tokens:,}", without.get("history"))):
            if found is not None:
                times = found["step_us"]
                rows.append(
                    (
                        size, name, f"{times['least']:.0f}", f"{times['p50']:.0f}",
                        f"{times['p99']:.0f}", f"{found['cpu_us_per_request']:.1f}",
                        f"{found['tokens_per_step']:.2f}",
                    )
                )  # fmt: skip
    columns = ("requests", "history", "us least", "p50", "p99", "cpu us a request", "tokens per step")
    parts = [Table(f"A step at {context:,} tokens of context", columns, rows)]
    if traces:
        replayed = result["replay"]
        replays = [
            (name, f"{replayed[name]['tokens_per_step']:.3f}", f"{replayed[name]['drafted_per_step']:.2f}")
            for name in ("batch", "proposer", "prompt_lookup")
        ]
        title = f"{replayed['requests']} recorded replies, chains of {max_chain} tokens at most"
        parts.append(Table(title, ("chains of", "tokens per step", "drafted"), replays))
    return Report(result, parts)
