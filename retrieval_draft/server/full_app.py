"""The full application: OpenAI's endpoints, the drafting service, metrics, dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, FastAPI, Response

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.server.app import PUBLIC, create_app
from retrieval_draft.server.dashboard.routes import PUBLIC as DASHBOARD_PUBLIC
from retrieval_draft.server.dashboard.routes import Dashboard
from retrieval_draft.server.draft_routes import mounted_drafts
from retrieval_draft.server.observability.metrics import ServerMetrics
from retrieval_draft.server.observability.metrics_drafting import DraftingMetrics
from retrieval_draft.server.observability.request_log import RequestLog
from retrieval_draft.server.scheduler.events import EngineListener
from retrieval_draft.server.service import Loaded, Service

__all__ = ["create_full_app"]


def create_full_app(service: Service, listeners: Sequence[EngineListener] = ()) -> FastAPI:
    """Makes the application that ``retrieval-draft serve`` runs.

    Args:
        service: The served service.
        listeners: Further listeners to the engine's events, such as `Tracing`.
    """
    metrics = ServerMetrics(model_name=service.settings.model_name)

    def watch(loaded: Loaded) -> None:
        loaded.tenants.when_made(metrics.watch)
        for name, tenants in loaded.adapters.items():
            tenants.when_made(partial(_watch_adapter, metrics, name))

    service.when_loaded.append(watch)
    observer = DraftingMetrics(metrics.registry)
    drafts, drafts_router = mounted_drafts(service, observer)
    observer.watch(drafts)
    dashboard = Dashboard(service)
    return create_app(
        service,
        listeners=(metrics, RequestLog(), dashboard.watcher, *listeners),
        extra_routers=(_metrics_router(metrics), drafts_router, dashboard.router),
        public=PUBLIC | DASHBOARD_PUBLIC,
    )


def _watch_adapter(metrics: ServerMetrics, name: str, tenant: str, drafter: RetrievalDrafter) -> None:
    metrics.watch(f"{tenant}/{name}", drafter)


def _metrics_router(metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    def read() -> Response:
        """Prometheus text."""
        body, content_type = metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    return router
