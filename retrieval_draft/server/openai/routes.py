"""OpenAI's endpoints, and /health."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import Struct
from msgspec.json import Decoder, encode

from retrieval_draft.http.event_stream import EventStream, unless_gone
from retrieval_draft.http.json_response import Json
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import read_body
from retrieval_draft.server.openai.api_errors import GENERATED, ErrorBody, body_schema
from retrieval_draft.server.openai.chat_replies import ChatReplies
from retrieval_draft.server.openai.chat_request import CHAT, ChatRequest
from retrieval_draft.server.openai.completions_request import COMPLETION
from retrieval_draft.server.openai.format import CompletionFormat, ResponseFormat
from retrieval_draft.server.openai.generation_request import GenerationFields
from retrieval_draft.server.openai.prepare import prepare_request, tokenize
from retrieval_draft.server.openai.response import ResponseWriter
from retrieval_draft.server.openai.responses_request import RESPONSES, named_as_here
from retrieval_draft.server.openai.responses_writer import ResponsesWriter
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.service import Loaded, Service

__all__ = ["LoadRequest", "make_router"]

_DEFAULT_COMPLETION = 16
"""OpenAI's default of max_tokens for completions."""


class LoadRequest(Struct, forbid_unknown_fields=True):
    """A model that a client is about to use.

    Attributes:
        model: The served model's name.
    """

    model: str | None = None


_LOAD = Decoder(LoadRequest)


def make_router(service: Service) -> APIRouter:
    """The routes of one service."""
    router = APIRouter()

    @router.get("/health", responses={503: {"description": "Loading, stuck or about to stop."}})
    async def health() -> Response:
        """200 while requests are served, 503 while not; the body gives the reason."""
        status, body = service.health()
        return Json(body, status)

    @router.get("/v1/models", responses={401: {"model": ErrorBody}})
    async def models() -> Response:
        """The list of the served model and its adapters."""
        return Json({"object": "list", "data": [_model(service, name) for name in service.models]})

    @router.get("/v1/models/{name:path}", responses={401: {"model": ErrorBody}, 404: {"model": ErrorBody}})
    async def model(name: str) -> Response:
        """A served model by its name."""
        service.check_model(name)
        return Json(_model(service, name))

    @router.post("/load_model", responses=GENERATED, openapi_extra=body_schema("LoadRequest"))
    async def load_model(request: Request) -> Response:
        """Events of loading a model, as of ``transformers serve``: it is loaded."""
        body = await read_body(request, _LOAD)
        service.check_model(body.model)
        _ = service.loaded  # or else it is answered with 503
        told = {"status": "ready", "model": body.model or service.settings.model_name, "cached": True}
        return Response(b"data: " + encode(told) + b"\n\n", media_type="text/event-stream")

    @router.post("/v1/completions", responses=GENERATED, openapi_extra=body_schema("CompletionRequest"))
    async def completions(request: Request) -> Response:
        """Continues texts."""
        body = await read_body(request, COMPLETION)
        body.check()
        n, prompts = body.n or 1, body.prompts(service.settings.max_choices)
        samples = body.best_of or n
        _check_choices(service, samples * len(prompts))

        def prepare(job: Job, loaded: Loaded) -> None:
            special = body.add_special_tokens is not False
            ids = [
                prompt if isinstance(prompt, list) else tokenize(loaded, prompt, "prompt", special=special)
                for prompt in prompts
            ]
            texts = [loaded.decode(each) if isinstance(given, list) else given
                     for given, each in zip(prompts, ids, strict=True)]  # fmt: skip
            prepare_request(
                job, body, loaded, ids, _DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens,
                samples=samples, competing=samples > n, top_logprobs=body.alternatives,
                echoed=texts if body.echo else (),
            )  # fmt: skip

        def shape(loaded: Loaded, request_id: str) -> ResponseFormat:
            return CompletionFormat(
                f"cmpl-{request_id}", body.model or service.settings.model_name, loaded.texts,
                bool(body.return_token_ids), body.alternatives is not None,
            )  # fmt: skip

        return await _respond(service, request, body, prepare, shape, n if samples > n else None)

    @router.post("/v1/chat/completions", responses=GENERATED, openapi_extra=body_schema("ChatRequest"))
    async def chat(request: Request) -> Response:
        """Continues a conversation."""
        body = await read_body(request, CHAT)
        body.check()
        return await _chat(service, request, body)

    @router.post("/v1/responses", responses=GENERATED, openapi_extra=body_schema("ResponsesRequest"))
    async def responses(request: Request) -> Response:
        """Continues a conversation; keeps nothing of it."""
        body = await read_body(request, RESPONSES)
        body.check()
        name = body.model or service.settings.model_name
        writer = partial(ResponsesWriter, model=name, echoed=body.echoed)
        with named_as_here():
            return await _chat(service, request, body.chat, writer)

    return router


async def _chat(
    service: Service,
    request: Request,
    body: ChatRequest,
    writer: Callable[..., ResponseWriter] = ResponseWriter,
) -> Response:
    chat = ChatReplies(service, body)
    _check_choices(service, chat.samples)
    return await _respond(service, request, body, chat.prepare, chat.shape, chat.kept, writer)


async def _respond(
    service: Service,
    request: Request,
    fields: GenerationFields,
    prepare: Callable[[Job, Loaded], object],
    shape: Callable[[Loaded, str], ResponseFormat],
    kept: int | None,
    writer: Callable[..., ResponseWriter] = ResponseWriter,
) -> Response:
    """Submits a request to the engine, and returns the response to the client."""
    service.check_model(fields.model)
    request_id, tenant = request.state.request_id, request.state.tenant
    traceparent, size = request.headers.get("traceparent"), len(await request.body())
    job = await unless_gone(
        request.receive,
        service.submit(
            request_id,
            tenant,
            prepare,
            traceparent,
            request.state.client_id,
            size,
            fields.model,
            fields.priority or 0,
        ),
    )
    if job is None:
        return Response(status_code=499)
    with_metrics = bool(fields.metrics) or "x-draft-metrics" in request.headers
    answer = writer(
        job, shape(service.loaded, request_id), kept, fields.includes_usage, with_metrics,
        bool(fields.draft_marks),
    )  # fmt: skip
    if fields.stream:
        seconds = service.settings.send_seconds
        return EventStream(answer.events(), lambda: service.leave(job), seconds)
    return await answer.unless_gone(request.receive, lambda: service.leave(job))


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.settings.model_name
    shown = {"id": name, "object": "model", "created": service.created, "owned_by": "retrieval-draft"}
    return shown if name == base else {**shown, "parent": base}


def _check_choices(service: Service, choices: int) -> None:
    most = service.settings.max_choices
    if choices > most:
        raise ApiError(400, f"The request asks for {choices} choices; this server makes {most} at most.", "n")
