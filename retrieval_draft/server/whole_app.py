"""The application with all that belongs to it: OpenAI's endpoints, metrics, the request log."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Response

from retrieval_draft.server.app import PUBLIC, create_app
from retrieval_draft.server.metrics import ServerMetrics
from retrieval_draft.server.request_log import RequestLog
from retrieval_draft.server.service import Loaded, Service

__all__ = ["whole_app"]


def whole_app(service: Service) -> FastAPI:
    """Makes the application that ``retrieval-draft serve`` runs.

    Args:
        service: What stands behind it.
    """
    metrics = ServerMetrics(model_name=service.settings.model_name)

    def watch(loaded: Loaded) -> None:
        loaded.tenants.when_made(metrics.watch)

    service.when_loaded.append(watch)
    return create_app(
        service,
        listeners=(metrics, RequestLog()),
        extra_routers=(_metrics_router(metrics),),
        public=PUBLIC,
    )


def _metrics_router(metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    def read() -> Response:
        """Prometheus text."""
        body, content_type = metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    return router
