"""``retrieval-draft drafts``: drafts for engines that keep their own model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft._files import expanded
from retrieval_draft.cli._store_options import Share, Snapshots, Store, Tenant, config
from retrieval_draft.cli.common import Index
from retrieval_draft.errors import InvalidInputError

__all__ = ["app", "serve"]

app = typer.Typer(no_args_is_help=True, help="Drafts for engines that keep their own model.")


@app.callback()
def _group() -> None:
    """Makes a group of a single command."""


@app.command("serve")
def serve(
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Of the engines' model: a folder, a hub name, or a tokenizer.json."),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ids; instead of a tokenizer, for drafts from requests only."),
    ] = None,
    index: Index = None,
    phrases: Annotated[Path | None, typer.Option(help="Fixed texts that the model often repeats.")] = None,
    store: Store = None,
    tenant: Tenant = "default",
    share: Share = "reply",
    snapshots: Snapshots = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8700,
    unix_socket: Annotated[
        Path | None, typer.Option("--unix-socket", help="Listen there instead; only this user may connect.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="KEY or KEY=TENANT; repeatable. Also from RETRIEVAL_DRAFT_API_KEYS."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="The same, one a line.")] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Accept requests without a key, on any address.")
    ] = False,
    history_mb: Annotated[
        int, typer.Option(min=1, help="Memory for earlier requests, of each tenant.")
    ] = 256,
    history_folder: Annotated[
        Path | None, typer.Option(help="Folder of earlier requests' texts.", show_default=False)
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Open at once.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of all open sessions.")] = 1 << 25,
    max_session_tokens: Annotated[int, typer.Option(min=1, help="Of one session.")] = 1 << 20,
    idle_seconds: Annotated[float, typer.Option(min=0.1, help="Then a session is closed.")] = 600.0,
) -> None:
    """Serve drafts over HTTP, in the foreground, until interrupted. See docs/drafting_service.md."""
    from retrieval_draft.http.keys import KeyRing, is_loopback, read_keys

    keys = KeyRing(read_keys(api_key or (), api_key_file, tenant), tenant)
    if not keys and unix_socket is None and not is_loopback(host) and not no_auth:
        raise InvalidInputError(
            f"{host} can be reached by others, and there is no API key.",
            "Pass --api-key, or --no-auth if the network is trusted.",
        )
    settings = config(store, tenant, share, snapshots)
    encoder = None
    if tokenizer is not None:
        encoder = _tokenizer(tokenizer)
    elif vocabulary is None:
        raise InvalidInputError("Which ids are there?", "Pass --tokenizer, or --vocabulary.")
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.draft_service.app import DraftApp
    from retrieval_draft.draft_service.service import DraftService
    from retrieval_draft.draft_service.sessions import SessionLimits
    from retrieval_draft.draft_service.standalone import StandaloneApp
    from retrieval_draft.draft_service.standalone import serve as run
    from retrieval_draft.draft_service.tenants import Proposers
    from retrieval_draft.server.observability.metrics import ServerMetrics
    from retrieval_draft.server.observability.metrics_drafting import DraftingMetrics

    metrics = ServerMetrics()
    observer = DraftingMetrics(metrics.registry)
    folder = None if history_folder is None else str(history_folder)
    proposers = Proposers.for_tokenizer(
        encoder,
        vocabulary=vocabulary,
        corpora=index or (),
        phrases=phrases,
        store=settings,
        config=DraftConfig(history_bytes=history_mb << 20, history_folder=folder),
        default=tenant,
    )
    limits = SessionLimits(max_sessions, max_tokens, max_session_tokens, idle_seconds)
    service = DraftService(proposers, limits, observer)
    observer.watch(service)
    for each in keys.tenants:
        metrics.watch(each, proposers[each])
    print("Preparing ...", file=sys.stderr, flush=True)
    proposers[tenant].warm_up()
    drafts = DraftApp(service, keys.tenant)
    run(StandaloneApp(drafts, metrics), host=host, port=port, unix_socket=unix_socket)


def _tokenizer(name: str) -> Any:
    path = expanded(name)
    if path.is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    from retrieval_draft.models.loading import load_tokenizer

    return load_tokenizer(name)
