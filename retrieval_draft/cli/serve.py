"""``retrieval-draft serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft.cli._store_options import Share, Snapshots, Store, Tenant
from retrieval_draft.cli._store_options import config as store_config
from retrieval_draft.cli.common import CpuKernels, Device, Dtype, Exact, Index, Model, Nodes, Weights
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError

if TYPE_CHECKING:
    from retrieval_draft.server.settings import ServerSettings

__all__ = ["serve"]


def _repeatable(metavar: str, text: str) -> Any:
    return typer.Option(help=f"{text} Repeatable.", metavar=metavar, show_default=False)


_OF_VLLM = {
    "model", "host", "port", "dtype", "served_model_name", "api_key", "api_key_file", "no_auth", "index",
    "phrases", "history", "store", "tenant", "share", "snapshots", "engine",
}  # fmt: skip
"""Parameters that ``--engine vllm`` passes on."""


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    unix_socket: Annotated[
        Path | None, typer.Option(help="A unix socket to listen on, in place of host and port.")
    ] = None,
    method: Annotated[str, typer.Option(help="Drafting method: calibrated, a published one, or none.")] = (
        "calibrated"
    ),
    nodes: Nodes = None,
    index: Index = None,
    phrases: Annotated[Path | None, typer.Option(help="A file of fixed texts to draft from.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="A folder in which prompts and replies are kept to draft from.")
    ] = None,
    store: Store = None,
    tenant: Tenant = "default",
    share: Share = "reply",
    snapshots: Snapshots = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help='A smaller model or a trained head to draft with; "self": this one with layers skipped; '
            '"int8": its copy with rounded weights; "mtp": its layers for multi-token prediction.'
        ),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model for clients.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja chat template in place of the tokenizer's own.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="KEY or KEY=TENANT; repeatable. Also in RETRIEVAL_DRAFT_API_KEYS.", metavar="KEY"),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="The same, one a line.")] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Accept requests without a key, on any address.")
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Choices that may wait; 429 beyond.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Of a request; 413 beyond.")] = 4 << 20,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of one prompt.")] = None,
    max_reference_tokens: Annotated[
        int, typer.Option(min=0, help="Of the documents and the prediction of one request.")
    ] = 65536,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one reply, as an upper limit.")] = 4096,
    request_seconds: Annotated[float, typer.Option(help="From arrival to the end of a reply.")] = 600.0,
    stuck_seconds: Annotated[float, typer.Option(help="A longer step turns /health stuck.")] = 120.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds for running requests at a stop.")] = 30.0,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens in one pass.")] = 512,
    prefix_cache_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="For keys and values that later prompts with the same beginning reuse, "
            "as much again for each --lora; 0: none.",
        ),
    ] = 1 << 30,
    cors_origin: Annotated[
        list[str] | None,
        _repeatable("ORIGIN", 'Origin of web pages that may use the server: https://host; "*" for any.'),
    ] = None,
    tool_parser: Annotated[
        str, typer.Option(help="Form of the model's calls of tools: a family's name, auto or none.")
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help="Marks around its reasoning: a family's name, auto or none.")
    ] = "auto",
    tenant_weight: Annotated[
        list[str] | None,
        _repeatable("TENANT=WEIGHT", "Share of a tenant while several wait: 2 for twice that of others."),
    ] = None,
    max_cache_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Of keys and values of all that run; others wait.", show_default=False),
    ] = None,
    lora: Annotated[
        list[str] | None,
        _repeatable("NAME=FOLDER", "A LoRA adapter that requests may name as their model."),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Requests may name images and sounds below this folder: file:///FOLDER/a.png."),
    ] = None,
    fetch_images: Annotated[
        bool,
        typer.Option("--fetch-images", help="Requests may name files of public addresses: https://..."),
    ] = False,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="An OpenTelemetry collector for traces: http://localhost:4318.",
            envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    ] = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
    device: Device = None,
    cpu_kernels: CpuKernels = True,
    exact: Exact = None,
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
    from retrieval_draft.server.media.settings import MediaSettings
    from retrieval_draft.server.settings import ServerSettings

    settings = ServerSettings(
        model_name=served_model_name or Path(model).name or model,
        max_batch=max_batch,
        max_queue=max_queue,
        max_choices=min(64, max_queue),
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_reference_tokens=max_reference_tokens,
        max_tokens=max_tokens,
        prefill_chunk=prefill_chunk,
        request_seconds=request_seconds,
        stuck_seconds=stuck_seconds,
        grace_seconds=grace,
        cors_origins=tuple(cors_origin or ()),
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        tenant_weights=_weights(tenant_weight or ()),
        max_cache_bytes=max_cache_bytes,
        media=MediaSettings(image_folder, fetch_images),
    )
    if log_format not in ("text", "json"):
        raise InvalidInputError(f"log_format is {log_format!r}.", "Choose text or json.")
    keys = _keys(api_key or [], api_key_file, tenant, host if unix_socket is None else None, no_auth)
    shared = store_config(store, tenant, share, snapshots)
    if engine == "vllm":
        if lora:
            raise InvalidInputError(
                "vLLM has options of its own for adapters.", "Give --enable-lora --lora-modules after --."
            )
        if unix_socket is not None:
            raise InvalidInputError("vLLM is started on a host and port here.", "Leave --unix-socket out.")
        _check_vllm(context)
        launcher: Any = importlib.import_module("retrieval_draft.integrations.vllm.launcher")
        launcher.launch(
            model,
            host=host,
            port=port,
            dtype=dtype,
            served_model_name=settings.model_name,
            api_key=_only_key(api_key or [], api_key_file, tenant),
            corpora=index or (),
            phrases=phrases,
            store=shared,
            history_folder=history,
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
    from retrieval_draft.models.loading import check_name, check_weights, load_model, load_processor

    check_name(model)  # before torch, whose import takes seconds
    check_weights(weights)
    adapters = read_adapters(lora or (), settings.model_name)
    for folder in adapters.values():
        check_adapter(folder)

    def load() -> tuple[Any, Any]:
        import torch

        from retrieval_draft.config import DraftConfig
        from retrieval_draft.drafter import RetrievalDrafter

        config = DraftConfig(
            method=method,
            nodes=nodes,
            cpu_kernels=cpu_kernels,
            exact=exact,  # type: ignore[arg-type]  # the config checks it
            history_folder=None if history is None else str(history),
            prefix_cache_bytes=prefix_cache_bytes,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, weights=weights)
        drafter = RetrievalDrafter.for_model(
            loaded, tokenizer, method=method, config=config, corpora=index or (), phrases=phrases,
            store=shared, draft_model=draft_model,
        )  # fmt: skip
        return drafter, tokenizer

    _serve(
        settings, load, lambda: load_processor(model), adapters, keys, chat_template, log_format,
        otlp_endpoint, host, port, unix_socket,
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
    keys: Any,
    chat_template: Path | None,
    log_format: str,
    otlp_endpoint: str | None,
    host: str,
    port: int,
    unix_socket: Path | None,
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
        run(app, service, host=host, port=port, socket=unix_socket)
    finally:
        if tracing is not None:
            tracing.close()
        logs.stop()


def _keys(given: list[str], file: Path | None, tenant: str, host: str | None, no_auth: bool) -> Any:
    """The keys; none only where they are not needed or turned off.

    Raises:
        InvalidInputError: Other machines could reach the server without a key.
    """
    from retrieval_draft.http.keys import KEYS_VARIABLE, KeyRing, is_loopback, read_keys

    keys = read_keys(given, file, tenant)
    if no_auth and keys:
        raise InvalidInputError("There are API keys, and --no-auth.", "Leave one of them out.")
    if not keys and not no_auth and host is not None and not is_loopback(host):
        raise InvalidInputError(
            f"Everybody who can reach {host} could use the server.",
            f"Set --api-key or {KEYS_VARIABLE}, or say --no-auth.",
        )
    ring = KeyRing(keys, tenant)
    if len(ring.tenants) > _MAX_TENANTS:
        raise InvalidInputError(
            f"The API keys have {len(ring.tenants)} tenants.", f"One server has {_MAX_TENANTS} at most."
        )
    return ring


def _weights(given: Sequence[str]) -> dict[str, float]:
    """Weights of tenants by name.

    Raises:
        InvalidInputError: A word is not of the form TENANT=WEIGHT.
    """
    found = {}
    for word in given:
        name, _, weight = word.partition("=")
        try:
            found[name] = float(weight)
        except ValueError as error:
            raise InvalidInputError(f"{word!r} is not of the form TENANT=WEIGHT.") from error
    return found


_MAX_TENANTS = 64


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"The chat template {path} cannot be read: {error}.") from error


def _only_key(given: list[str], file: Path | None, tenant: str) -> str | None:
    """The key for vLLM, which has one key and no tenants.

    Raises:
        InvalidInputError: There are several.
    """
    from retrieval_draft.http.keys import read_keys

    keys = list(read_keys(given, file, tenant))
    if len(keys) > 1:
        raise InvalidInputError(f"vLLM takes one API key; there are {len(keys)}.", "Leave all but one out.")
    return keys[0] if keys else None
