"""``retrieval-draft store``: run an embedded store, show one, and write a snapshot."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli._encoder import load_encoder
from retrieval_draft.cli._store_options import URL_OPTION, needed, password
from retrieval_draft.cli.options import Fields, Json, Report, Table, command
from retrieval_draft.cli.output import print_json
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.store.config import StoreConfig

__all__ = ["app", "serve", "snapshot", "status"]

app = typer.Typer(no_args_is_help=True, help="The store that servers share: run it, show it, snapshot it.")

Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A model's folder or name, or a tokenizer.json.", show_default=False),
]


@app.command("serve")
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of the data.", show_default=False)],
    host: Annotated[
        str | None, typer.Option(help="An address to listen on besides the socket.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --host.")] = 6379,
    max_mb: Annotated[int, typer.Option(min=16, help="The most memory it may take.")] = 1024,
    json: Json = False,
) -> None:
    """Run a store in the foreground, until interrupted: for processes of one machine, or more with --host.

    They use it as embedded://FOLDER, unix:///FOLDER/store.sock or redis://HOST:PORT. A password is taken from
    RETRIEVAL_DRAFT_REDIS_PASSWORD, there and here.
    """
    from retrieval_draft.index.store.embedded import EmbeddedServer

    server = EmbeddedServer(folder, max_mb << 20, password=password(), host=host, port=port)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    try:
        socket = server.ensure()
        if not server.is_owner:
            raise DatastoreError(
                f"Another process serves {folder} already.", f"Use it: --store embedded://{folder}"
            )
        urls = [f"embedded://{folder}", f"unix://{socket}"]
        urls += [] if host is None else [f"redis://{host}:{port}"]
        if json:
            print_json({"urls": urls, "folder": str(folder)})
        else:
            print("\n".join(urls))
        sys.stdout.flush()
        while not over.wait(1.0):
            server.ensure()  # restarts a killed server with its data
    finally:
        server.close()


@app.command("status")
@command
def status(store: Annotated[StoreConfig, Fields(url=URL_OPTION, defaults={"url": ""})]) -> Report:
    """Show a store's contents: size and age of each tokenizer's and tenant's log."""
    import msgspec

    from retrieval_draft.index.store.describe_store import describe_store
    from retrieval_draft.index.store.url import parse_store_url

    url = parse_store_url(needed(store).url)
    server, namespaces = describe_store(url)
    found = [msgspec.to_builtins(each) for each in namespaces]
    rows = [
        (
            f"{each.fingerprint[:12]} {each.tenant}",
            f"{each.entries:,}",
            "?" if each.nbytes is None else f"{each.nbytes / 1e6:.1f}",
            _age(each.oldest),
            _age(each.newest),
        )
        for each in namespaces
    ]
    return Report(
        {"store": str(url), "server": dict(server), "namespaces": found},
        [
            Table(f"{url}", ("server", ""), [(name, _shown(value)) for name, value in server.items()]),
            Table("", ("tokenizer and tenant", "entries", "MB", "oldest", "newest"), rows),
        ],
    )


@app.command("snapshot")
@command
def snapshot(
    store: Annotated[
        StoreConfig, Fields("snapshots", "tenant", url=URL_OPTION, defaults={"url": "", "share": "none"})
    ],
    tokenizer: Tokenizer = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to read the log.")] = 300.0,
) -> Report:
    """Read the log to its end and write a snapshot, from which new servers start."""
    from retrieval_draft.index.store.store import SharedStore

    if store.snapshots is None or tokenizer is None:
        missing = "--snapshots" if store.snapshots is None else "--tokenizer"
        raise InvalidInputError(
            f"{missing} is missing.", "A snapshot has a location, and belongs to a tokenizer."
        )
    settings = needed(store)
    encoder = load_encoder(tokenizer)
    with SharedStore(settings, encoder.fingerprint, encoder.vocabulary) as opened:
        if not opened.wait_ready(timeout):
            reason = opened.health.reason or f"{timeout:.0f} seconds were not enough"
            raise DatastoreError(
                f"The log could not be read: {reason}.", "Check the store, or give more time."
            )
        info = opened.snapshot()
    result: dict[str, Any] = {
        "name": info.name,
        "entries": info.entries,
        "tokens": info.tokens,
        "nbytes": info.nbytes,
        "created": info.created,
    }
    return Report(
        result, [Table("", ("snapshot", ""), [(name, _shown(value)) for name, value in result.items()])]
    )


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int and value < 10**12 else str(value)


def _age(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    seconds = max(0.0, time.time() - milliseconds / 1000)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
