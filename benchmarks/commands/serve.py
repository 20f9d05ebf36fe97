"""``python -m benchmarks serve``, ``mixed``, ``turns``: load on a server, and drafting's gain there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.bench.busy import busy_processes
from retrieval_draft.cli.common import Beside
from retrieval_draft.cli.options import Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["mixed", "serve", "turns"]


@measurement
def serve(
    clients: Annotated[int, typer.Option(min=1, help="At the same time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="After which no client asks more.")] = 60.0,
    model: Annotated[
        str | None, typer.Option(help="A tiny one with random weights by default.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="A drafting method.")] = "calibrated",
    max_batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 8,
    distinct: Annotated[int, typer.Option(min=1, help="Different requests to draw from.")] = 256,
    compare_none: Annotated[
        bool, typer.Option("--compare-none", help="Measure against a server without drafts instead.")
    ] = False,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prompt files for --compare-none.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of --compare-none.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply of --compare-none.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of --compare-none.")] = 2,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the server's torch; 1 for the tiny model.", show_default=False),
    ] = None,
    beside: Beside = 0,
) -> Report:
    """Load a server: whole streams, answers as offline, bounded memory; or its speed against no drafts."""
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            from benchmarks.serve_model import save_tiny_model

            save_tiny_model(Path(scratch))
            # The passes of a tiny model take less time than the synchronisation of threads.
            threads = threads or 1
        options = ["--model", model or scratch, "--max-batch", str(max_batch)]
        if threads is not None:
            import torch

            torch.set_num_threads(threads)  # the answers are made offline with as many
            options += ["--threads", str(threads)]
        with busy_processes(beside):
            if compare_none:
                result = _compare(options, method, clients, prompts, limit, max_new_tokens, rounds)
            else:
                result = _load(options, method, model or scratch, clients, seconds, distinct)
    from retrieval_draft.bench.provenance import provenance

    result |= {
        "model": model or "tiny",
        "method": method,
        "clients": clients,
        "max_batch": max_batch,
        "beside": beside,
    }
    return Report(
        result,
        [
            Table(
                "",
                ("server", ""),
                [(key, str(value)) for key, value in result.items() if not isinstance(value, list)],
            )
        ],
        different=bool(result.get("different") or result.get("wrong")),
        saved=result | provenance(),
    )


@measurement
def mixed(
    clients: Annotated[int, typer.Option(min=1, help="At the same time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="After which no client asks more.")] = 300.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 8,
    distinct: Annotated[int, typer.Option(min=10, help="Different requests to draw from.")] = 200,
    prefix_cache_mib: Annotated[int, typer.Option(min=0, help="Small enough to fill at once.")] = 16,
) -> Report:
    """Load a tiny server with chats, tools, JSON, images, clients that leave and bad requests."""
    from benchmarks.mixed_asks import make_mixed_asks
    from benchmarks.mixed_load import answers_alone, run_mixed, spread_ms
    from benchmarks.mixed_model import save_mixed_model
    from benchmarks.serve_process import ServeProcess
    from retrieval_draft.bench.provenance import provenance

    asks = make_mixed_asks(distinct)
    with tempfile.TemporaryDirectory() as scratch:
        save_mixed_model(Path(scratch))
        options = ["--model", scratch, "--served-model-name", "mixed", "--threads", "1"]
        alone = ServeProcess([*options, "--method", "none", "--max-batch", "2", "--prefix-cache-bytes", "0"])
        try:
            expected, faults, gaps = answers_alone(alone.port, asks)
        finally:
            alone.stop()
        cache = str(prefix_cache_mib << 20)
        server = ServeProcess([*options, "--max-batch", str(max_batch), "--prefix-cache-bytes", cache])
        try:
            loaded = run_mixed(server, asks, expected, clients, seconds)
            status = server.health()
        finally:
            code = server.stop()
    loaded.faults += faults
    result = {"clients": clients, "max_batch": max_batch, **loaded.summary()}
    result |= {"gap_ms_alone": spread_ms(gaps), "health_after": status, "exit_code": code}
    rows = result | {"gaps_over_200_ms": len(result["gaps_over_200_ms"])}
    table = Table("", ("mixed", ""), [(key, str(value)) for key, value in rows.items()])
    different = bool(loaded.different or loaded.faults or code)
    return Report(result, [table], different, saved=result | provenance())


@measurement
def turns(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=16, help="Of the first prompt.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Conversations.")] = 5,
) -> Report:
    """Time a conversation's second turn to its first token, against one that nothing is known of."""
    from benchmarks.turns import measure_turns
    from retrieval_draft.bench.provenance import provenance

    result = measure_turns(model, tokens=tokens, rounds=rounds)
    table = Table("", ("turns", ""), [(name, str(value)) for name, value in result.items()])
    return Report(result, [table], saved=result | provenance())


def _load(
    options: list[str], method: str, model: str, clients: int, seconds: float, distinct: int
) -> dict[str, Any]:
    from benchmarks.serve_load import check_answers, make_asks, run_load
    from benchmarks.serve_process import ServeProcess
    from retrieval_draft.models.loading import load_model

    server = ServeProcess([*options, "--method", method])
    try:
        loaded = run_load(server, make_asks(distinct), clients, seconds)
        status = server.health()
    finally:
        code = server.stop()
    resident = loaded.resident
    checked = check_answers(loaded, *load_model(model))
    quarter = max(len(resident) // 4, 1)
    return {
        "requests": loaded.requests,
        "seconds": loaded.seconds,
        "tokens": loaded.tokens,
        "tokens_per_second": loaded.tokens / loaded.seconds,
        "refused": loaded.refused,
        "wrong": loaded.wrong[:10],
        **checked,
        "resident_mib": {
            "start": resident[0] >> 20,
            "first_quarter": resident[quarter - 1] >> 20,
            "end": resident[-1] >> 20,
            "peak": max(resident) >> 20,
        },
        "health_after": status,
        "exit_code": code,
    }


def _compare(
    options: list[str],
    method: str,
    clients: int,
    prompts: list[Path] | None,
    limit: int,
    max_new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    from benchmarks.serve_client import Ask
    from benchmarks.serve_compare import compare_servers
    from benchmarks.serve_load import make_asks
    from benchmarks.serve_process import ServeProcess
    from retrieval_draft.bench.prompts import read_prompts, spread

    if prompts:
        texts = [prompt.text or "" for prompt in spread(read_prompts(prompts), limit)]
    else:
        texts = [ask.prompt for ask in make_asks(limit)]
    if len(texts) < rounds:
        raise InvalidInputError(f"{len(texts)} prompts are too few for {rounds} rounds.")
    asks = [Ask(text, 0, max_new_tokens, 0.0) for text in texts]
    servers: dict[str, ServeProcess] = {}
    try:
        for each in (method, "none"):
            servers[each] = ServeProcess([*options, "--method", each])
        return compare_servers(servers, asks, clients, rounds)
    finally:
        for server in servers.values():
            server.stop()
