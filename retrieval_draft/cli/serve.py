"""``retrieval-draft serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft.cli._store_options import Store, configured
from retrieval_draft.cli.common import (
    Address,
    KeyOptions,
    ModelOptions,
    SourceOptions,
    drafting_fields,
)
from retrieval_draft.cli.options import Fields, command
from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError
from retrieval_draft.http.malloc import keep_malloc_small
from retrieval_draft.server.media.settings import MediaSettings
from retrieval_draft.server.settings import ServerSettings

if TYPE_CHECKING:
    from retrieval_draft.http.keys import KeyRing

__all__ = ["serve"]


_OF_VLLM = {
    "model", "host", "port", "dtype", "served_model_name", "api_key", "api_key_file", "no_auth", "index",
    "phrases", "history", "store", "tenant", "share", "snapshots", "engine",
}  # fmt: skip
"""Parameters that ``--engine vllm`` passes on."""


@command
def serve(
    context: typer.Context,
    model: Annotated[ModelOptions, Fields(...)],
    address: Annotated[Address, Fields(...)],
    config: Annotated[
        DraftConfig,
        drafting_fields("prefix_cache_bytes", "history_bytes", "adjacency_rows", prefix_cache_bytes=1 << 30),
    ],
    sources: Annotated[SourceOptions, Fields(...)],
    store: Store,
    keys: Annotated[KeyOptions, Fields(...)],
    settings: Annotated[
        ServerSettings,
        Fields(
            ...,
            without=("media",),
            model_name=typer.Option("--served-model-name", show_default=False),
            history_bytes="--tenant-history-bytes",
            grace_seconds="--grace",
            cors_origins=typer.Option("--cors-origin", metavar="ORIGIN"),
            tenant_weights=typer.Option("--tenant-weight", metavar="TENANT=WEIGHT"),
            defaults={"model_name": ""},
        ),
    ],
    media: Annotated[MediaSettings, Fields(folder="--image-folder", fetches="--fetch-images")],
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja chat template in place of the tokenizer's own.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA adapter that requests may name as their model. Repeatable.", metavar="NAME=FOLDER"
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="An OpenTelemetry collector for traces: http://localhost:4318.",
            envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch; by default as many as cores.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm.")] = "transformers",
    vllm_arguments: Annotated[
        list[str] | None,
        typer.Argument(help="With --engine vllm, after --: options of vllm serve.", show_default=False),
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients, its drafts made from text seen before."""
    name = settings.model_name or Path(model.model).name or model.model
    settings = replace(settings, model_name=name, media=media)
    if log_format not in ("text", "json"):
        raise InvalidInputError(f"log_format is {log_format!r}.", "Choose text or json.")
    ring = keys.ring(address, store.tenant, settings.max_tenants)
    shared = configured(store)
    if engine == "vllm":
        if lora:
            raise InvalidInputError(
                "vLLM has options of its own for adapters.", "Give --enable-lora --lora-modules after --."
            )
        if address.unix_socket is not None:
            raise InvalidInputError("vLLM is started on a host and port here.", "Leave --unix-socket out.")
        _check_vllm(context)
        launcher: Any = importlib.import_module("retrieval_draft.integrations.vllm.launcher")
        launcher.launch(
            model.model,
            host=address.host,
            port=address.port,
            dtype=model.dtype,
            served_model_name=name,
            api_key=_only_key(list(keys.read(store.tenant))),
            corpora=sources.corpora,
            phrases=sources.phrases,
            store=shared,
            history_folder=config.history_folder,
            arguments=vllm_arguments or (),
        )
        return
    if vllm_arguments:
        raise InvalidInputError(
            f"{' '.join(vllm_arguments)} has no option before it; such words are for --engine vllm only.",
            "Name the model with --model; see retrieval-draft serve --help.",
        )
    if engine != "transformers":
        raise InvalidInputError(f"There is no engine {engine!r}.", "Choose transformers or vllm.")
    from retrieval_draft.models.adapters import check_adapter, read_adapters
    from retrieval_draft.models.loading import load_processor

    keep_malloc_small()
    model.check()  # before torch, whose import takes seconds
    adapters = read_adapters(lora or (), name)
    for folder in adapters.values():
        check_adapter(folder)

    def load() -> tuple[Any, Any]:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        loaded, tokenizer = model.load()
        return sources.drafter(loaded, tokenizer, config, shared), tokenizer

    _serve(
        settings, load, lambda: load_processor(model.model), adapters, ring, chat_template, log_format,
        otlp_endpoint, address,
    )  # fmt: skip


def _check_vllm(context: typer.Context) -> None:
    """Refuses options that vLLM would not see.

    Raises:
        InvalidInputError: Names them, and those that it sees.
    """
    names = {
        each.name or "": "/".join([each.opts[0], *each.secondary_opts])
        for each in context.command.params
        if each.param_type_name == "option"
    }
    given = [
        option
        for name, option in names.items()
        if name not in _OF_VLLM and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        allowed = ", ".join(option for name, option in names.items() if name in _OF_VLLM)
        raise InvalidInputError(
            f"--engine vllm has no {', '.join(given)}.",
            f"It takes {allowed}; options of vLLM's own go after --.",
        )


def _serve(
    settings: ServerSettings,
    load: Any,
    load_processor: Any,
    adapters: dict[str, Path],
    keys: KeyRing,
    chat_template: Path | None,
    log_format: str,
    otlp_endpoint: str | None,
    address: Address,
) -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise RetrievalDraftError(
            f"The server needs {error.name}, which is not installed.",
            'Run: pip install "retrieval_draft[server]"',
        ) from error
    from retrieval_draft.server.full_app import create_full_app
    from retrieval_draft.server.observability.request_log import start_logging
    from retrieval_draft.server.run import run
    from retrieval_draft.server.service import Service

    template = None if chat_template is None else _read(chat_template)
    service = Service(
        settings, load, keys=keys, chat_template=template, load_processor=load_processor, adapters=adapters
    )
    tracing = None
    if otlp_endpoint:
        from retrieval_draft.server.observability.tracing import Tracing

        tracing = Tracing.to_otlp(otlp_endpoint, model_name=settings.model_name)
    app = create_full_app(service, () if tracing is None else (tracing,))
    logs = start_logging(log_format, logging.getLogger("retrieval_draft").level or logging.INFO)
    try:
        run(app, service, host=address.host, port=address.port, socket=address.unix_socket)
    finally:
        if tracing is not None:
            tracing.close()
        logs.stop()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"The chat template {path} cannot be read: {error}.") from error


def _only_key(keys: Sequence[str]) -> str | None:
    """The key for vLLM, which has one key and no tenants.

    Raises:
        InvalidInputError: There are several.
    """
    if len(keys) > 1:
        raise InvalidInputError(f"vLLM takes one API key; there are {len(keys)}.", "Leave all but one out.")
    return keys[0] if keys else None
