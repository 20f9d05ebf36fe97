"""``retrieval-draft drafts``: drafts for engines that keep their own model."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from retrieval_draft._files import expanded
from retrieval_draft.cli._store_options import Store, configured
from retrieval_draft.cli.common import Address, KeyOptions, SourceOptions
from retrieval_draft.cli.options import Fields, command
from retrieval_draft.config import DraftConfig
from retrieval_draft.draft_service.limits import SessionLimits
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.http.malloc import keep_malloc_small

__all__ = ["app", "serve"]

app = typer.Typer(no_args_is_help=True, help="Drafts for engines that keep their own model.")


@app.callback()
def _group() -> None:
    """Makes a group of a single command."""


@app.command("serve")
@command
def serve(
    store: Store,
    sources: Annotated[SourceOptions, Fields("corpora", "phrases")],
    address: Annotated[
        Address,
        Fields(
            ...,
            unix_socket=typer.Option(help="Listen there instead; only this user may connect."),
            defaults={"port": 8700},
        ),
    ],
    keys: Annotated[KeyOptions, Fields(...)],
    limits: Annotated[SessionLimits, Fields(...)],
    config: Annotated[DraftConfig, Fields(history_folder=typer.Option(metavar="PATH", show_default=False))],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Of the engines' model: a folder, a hub name, or a tokenizer.json."),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ids; instead of a tokenizer, for drafts from requests only."),
    ] = None,
    history_mb: Annotated[
        int, typer.Option(min=1, help="Memory for earlier requests, of each tenant.")
    ] = 256,
) -> None:
    """Serve drafts over HTTP, in the foreground, until interrupted. See docs/drafting_service.md."""
    ring = keys.ring(address, store.tenant)
    settings = configured(store)
    keep_malloc_small()
    encoder = None
    if tokenizer is not None:
        encoder = _tokenizer(tokenizer)
    elif vocabulary is None:
        raise InvalidInputError("Which ids are there?", "Pass --tokenizer, or --vocabulary.")
    from retrieval_draft.draft_service.app import DraftApp
    from retrieval_draft.draft_service.service import DraftService
    from retrieval_draft.draft_service.standalone import StandaloneApp
    from retrieval_draft.draft_service.standalone import serve as run
    from retrieval_draft.draft_service.tenants import Proposers
    from retrieval_draft.server.observability.metrics import ServerMetrics
    from retrieval_draft.server.observability.metrics_drafting import DraftingMetrics

    metrics = ServerMetrics()
    observer = DraftingMetrics(metrics.registry)
    proposers = Proposers.for_tokenizer(
        encoder,
        vocabulary=vocabulary,
        corpora=sources.corpora,
        phrases=sources.phrases,
        store=settings,
        config=replace(config, history_bytes=history_mb << 20),
        default=store.tenant,
    )
    service = DraftService(proposers, limits, observer)
    observer.watch(service)
    for each in ring.tenants:
        metrics.watch(each, proposers[each])
    print("Preparing ...", file=sys.stderr, flush=True)
    proposers[store.tenant].warm_up()
    drafts = DraftApp(service, ring.tenant)
    run(StandaloneApp(drafts, metrics), host=address.host, port=address.port, unix_socket=address.unix_socket)


def _tokenizer(name: str) -> Any:
    path = expanded(name)
    if path.is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    from retrieval_draft.models.loading import load_tokenizer

    return load_tokenizer(name)
