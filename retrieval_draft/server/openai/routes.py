"""OpenAI's endpoints, and /health."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from retrieval_draft.http.event_stream import EventStream, unless_gone
from retrieval_draft.http.json_response import Json
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import read_body
from retrieval_draft.server.media.prompt import take_urls
from retrieval_draft.server.openai.chat_request import CHAT
from retrieval_draft.server.openai.chat_template import render_chat
from retrieval_draft.server.openai.completions_request import COMPLETION
from retrieval_draft.server.openai.format import ChatFormat, CompletionFormat, ResponseFormat
from retrieval_draft.server.openai.generation_request import GenerationFields
from retrieval_draft.server.openai.prepare import (
    GenerationParams,
    Means,
    PreparedRequest,
    check_length,
    prepare_request,
    tokenize,
)
from retrieval_draft.server.openai.response import ResponseWriter
from retrieval_draft.server.service import Loaded, Service

__all__ = ["make_router"]

_DEFAULT_COMPLETION = 16
"""OpenAI's default of max_tokens for completions."""


class _ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: _ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
_GENERATED: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
}


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
        _check_model(service, name)
        return Json(_model(service, name))

    @router.post("/v1/completions", responses=_GENERATED, openapi_extra=_body("CompletionRequest"))
    async def completions(request: Request) -> Response:
        """Continues texts."""
        body = await read_body(request, COMPLETION)
        body.check()
        n, prompts = body.n or 1, body.prompts(service.settings.max_choices)
        samples = body.best_of or n
        _check_choices(service, samples * len(prompts))

        def prepare(loaded: Loaded, means: Means) -> PreparedRequest:
            special = body.add_special_tokens is not False
            ids = [
                prompt if isinstance(prompt, list) else tokenize(means, prompt, "prompt", special=special)
                for prompt in prompts
            ]
            texts = [loaded.decode(each) if isinstance(given, list) else given
                     for given, each in zip(prompts, ids, strict=True)]  # fmt: skip
            asks = GenerationParams(
                ids,
                _DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens,
                samples,
                samples > n,
                body.alternatives,
                texts if body.echo else (),
            )
            return prepare_request(asks, body, means)

        def shape(loaded: Loaded, request_id: str) -> ResponseFormat:
            return CompletionFormat(
                f"cmpl-{request_id}", body.model or service.settings.model_name, loaded.texts,
                bool(body.return_token_ids), body.alternatives is not None,
            )  # fmt: skip

        return await _respond(service, request, body, prepare, shape, n if samples > n else None)

    @router.post("/v1/chat/completions", responses=_GENERATED, openapi_extra=_body("ChatRequest"))
    async def chat(request: Request) -> Response:
        """Continues a conversation."""
        body = await read_body(request, CHAT)
        body.check()
        _check_choices(service, body.n or 1)
        conversation, variables = body.conversation, body.variables
        urls = take_urls(conversation)

        def prepare(loaded: Loaded, means: Means) -> PreparedRequest:
            media = loaded.media
            template = service.chat_template or (None if media is None else media.template)

            def render(messages: list[dict[str, Any]]) -> str:
                return render_chat(
                    loaded.tokenizer, messages, template, variables, body.add_generation_prompt,
                    bool(body.continue_final_message),
                )  # fmt: skip

            if media is None:
                if urls:
                    raise ApiError(400, "image_url: this model reads no images, text alone.", "messages")
                text = render(conversation)
            else:
                text = render(media.parts(conversation, render))
            top = (body.top_logprobs or 0) if body.logprobs else None
            inputs: Mapping[str, Any] = {}
            if media is not None and urls:
                check_length(means, text, "messages")
                prompt = media.prompt(text, urls, means.check)
                ids, inputs = prompt.ids, prompt.inputs
            else:
                ids = tokenize(means, text, "messages", special=False)
            asks = GenerationParams([ids], body.wanted_tokens, body.n or 1, False, top, model_inputs=inputs)
            return prepare_request(asks, body, means)

        def shape(loaded: Loaded, request_id: str) -> ResponseFormat:
            return ChatFormat(
                f"chatcmpl-{request_id}", body.model or service.settings.model_name, loaded.texts,
                bool(body.return_token_ids), bool(body.logprobs),
            )  # fmt: skip

        return await _respond(service, request, body, prepare, shape, None)

    return router


async def _respond(
    service: Service,
    request: Request,
    fields: GenerationFields,
    prepare: Callable[[Loaded, Means], PreparedRequest],
    shape: Callable[[Loaded, str], ResponseFormat],
    kept: int | None,
) -> Response:
    """Submits a request to the engine, and returns the response to the client."""
    _check_model(service, fields.model)
    request_id, tenant = request.state.request_id, request.state.tenant
    traceparent, size = request.headers.get("traceparent"), len(await request.body())
    submitted = await unless_gone(
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
    if submitted is None:
        return Response(status_code=499)
    job, asked = submitted
    with_metrics = bool(fields.metrics) or "x-draft-metrics" in request.headers
    answer = ResponseWriter(
        job, asked, shape(service.loaded, request_id), kept, fields.includes_usage, with_metrics,
        bool(fields.draft_marks),
    )  # fmt: skip
    if fields.stream:
        seconds = service.settings.send_seconds
        return EventStream(answer.events(), lambda: service.leave(job), seconds)
    return await answer.unless_gone(request.receive, lambda: service.leave(job))


def _body(name: str) -> dict[str, Any]:
    """Names the schema of a body in the description of the API."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.settings.model_name
    shown = {"id": name, "object": "model", "created": service.created, "owned_by": "retrieval-draft"}
    return shown if name == base else {**shown, "parent": base}


def _check_model(service: Service, name: str | None) -> None:
    served = service.models
    if name is not None and name not in served:
        names = ", ".join(map(repr, served))
        raise ApiError(404, f"There is no model {name!r} here; this server has {names}.", "model")


def _check_choices(service: Service, choices: int) -> None:
    most = service.settings.max_choices
    if choices > most:
        raise ApiError(400, f"The request asks for {choices} choices; this server makes {most} at most.", "n")
