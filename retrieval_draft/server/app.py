"""The ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from retrieval_draft import __version__
from retrieval_draft.http.body_limit import BodyLimit
from retrieval_draft.http.head_requests import HeadAsGet
from retrieval_draft.http.json_response import Json
from retrieval_draft.server.auth import AuthMiddleware
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.chat_request import ChatRequest, Message
from retrieval_draft.server.openai.completions_request import CompletionRequest
from retrieval_draft.server.openai.responses_request import ResponsesRequest
from retrieval_draft.server.openai.routes import LoadRequest, make_router
from retrieval_draft.server.openai.token_routes import DetokenizeRequest, TokenizeRequest, token_router
from retrieval_draft.server.openai.tools import Tool
from retrieval_draft.server.scheduler.events import EngineListener
from retrieval_draft.server.service import Service

__all__ = ["PUBLIC", "create_app"]

PUBLIC = frozenset({"/health"})
"""Paths that need no API key."""

_log = logging.getLogger("retrieval_draft.server")


def create_app(
    service: Service,
    *,
    listeners: Sequence[EngineListener] = (),
    extra_routers: Sequence[APIRouter] = (),
    public: frozenset[str] = PUBLIC,
) -> FastAPI:
    """Makes the application of a service, which starts with it and ends with it.

    Args:
        service: The served service.
        listeners: Receive the engine's events.
        extra_routers: More routes: metrics, the drafting service, a dashboard.
        public: Paths that need no API key.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    service.extend(listeners)
    app = FastAPI(
        title="retrieval-draft", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.include_router(make_router(service))
    app.include_router(token_router(service))
    for router in extra_routers:
        app.include_router(router)
    _handle_errors(app)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(HeadAsGet)
    app.add_middleware(AuthMiddleware, service=service, public=public)
    if service.settings.cors_origins:
        # Before authentication: browsers send preflight requests without the key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _describe_bodies(app)
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Adds the schemas of request bodies, which routes read themselves, to the description of the API."""
    made = app.openapi
    _, schemas = msgspec.json.schema_components(
        [
            CompletionRequest,
            ChatRequest,
            Message,
            Tool,
            ResponsesRequest,
            LoadRequest,
            TokenizeRequest,
            DetokenizeRequest,
        ],
        ref_template="#/components/schemas/{name}",
    )

    def described() -> dict[str, Any]:
        schema = made()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return schema

    replaced: Any = described
    app.openapi = replaced  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _handle_errors(app: FastAPI) -> None:
    async def api(request: Request, error: Any) -> Response:
        return _response(error)

    async def http(request: Request, error: Any) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path}."
        if error.status_code == 405:
            message = f"{request.method} is not allowed at {request.url.path}."
        response = _response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        if error.status_code in (408, 413):
            response.headers["Connection"] = "close"
        return response

    async def failed(request: Request, error: Any) -> Response:
        _log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
        return _response(ApiError(500, "The server failed; its log says why."))

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _response(error: ApiError) -> Json:
    return Json(error.body(), error.status, error.headers())
