"""Commands of ``python -m benchmarks``."""

from __future__ import annotations

import typer

from benchmarks.commands import (
    agents,
    beside,
    chains,
    drafts,
    fleet,
    grammars,
    heads,
    llama_cpp,
    models,
    parts,
    sampling,
    serve,
    store,
    tokenizers,
    vllm,
    weights,
)

__all__ = ["app"]

app = typer.Typer(
    name="benchmarks",
    help="Measure the project itself: evidence for docs/benchmarks.md.",
    epilog="gpu_check runs a whole check of a GPU: docs/gpu.md.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (
    agents.agents, parts.automaton, sampling.batch, beside.beside, chains.chains, parts.cold, drafts.drafts,
    sampling.draw, fleet.fleet, parts.fusion, grammars.grammars, heads.heads, llama_cpp.llama_cpp, parts.loop,
    serve.mixed, models.models, parts.passes, agents.restart, sampling.samples, serve.serve, store.store,
    tokenizers.tokenizers, heads.trim,
    serve.turns, vllm.vllm, weights.weights,
):  # fmt: skip
    app.command(_command.__name__)(_command)
