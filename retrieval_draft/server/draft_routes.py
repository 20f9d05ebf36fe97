"""The drafting service as a part of the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from retrieval_draft.draft_service.app import PREFIX, DraftApp
from retrieval_draft.draft_service.errors import error_of
from retrieval_draft.draft_service.service import DraftObserver, DraftService
from retrieval_draft.draft_service.tenants import Proposers
from retrieval_draft.proposer import Proposer
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.service import Service

__all__ = ["mounted_drafts"]


def mounted_drafts(service: Service, observer: DraftObserver) -> tuple[DraftService, APIRouter]:
    """Drafts from the server's corpora and stores, with a history of their own.

    Args:
        service: Of the server; its model need not be loaded yet.
        observer: Receives the service's events.

    Returns:
        The drafting service, and a router that ends it with the application.
    """
    drafts = DraftService(
        Proposers(lambda tenant: _proposer(service, tenant), service.settings.max_tenants), observer=observer
    )
    app = DraftApp(drafts, max_body=service.settings.max_body_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        app.close()
        await asyncio.to_thread(drafts.close)

    router = APIRouter(lifespan=lifespan)
    # A route of its own, as the schema of the API describes JSON and this is mostly MessagePack.
    endpoint: Any = app
    for path in (PREFIX, PREFIX + "/{rest:path}"):
        router.routes.append(Route(path, endpoint, include_in_schema=False))
    return drafts, router


def _proposer(service: Service, tenant: str) -> Proposer:
    try:
        drafter = service.loaded.tenants[tenant]
    except ApiError as error:
        raise error_of(error.status, error.message) from error
    parts = drafter.context
    return Proposer(replace(parts.stores, owns_shared=False), replace(parts.config, history_folder=None))
