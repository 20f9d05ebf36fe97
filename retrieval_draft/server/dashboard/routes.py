"""The dashboard's routes: one page, its style and script, and a feed of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from retrieval_draft.http.event_stream import EventStream
from retrieval_draft.server.dashboard.feed import Feed
from retrieval_draft.server.dashboard.watcher import Watcher
from retrieval_draft.server.service import Loaded, Service

__all__ = ["PUBLIC", "Dashboard"]

_FILES = {
    "/": ("dashboard.html", "text/html"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript"),
}
PUBLIC = frozenset(_FILES)
"""Paths that need no key: they hold no data, and the page asks for the key."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Dashboard:
    """The page, its watcher and its feed.

    Args:
        service: Of the server; its model need not be loaded yet.

    Attributes:
        watcher: A listener for the engine.
        feed: Sends to open pages.
        router: For `create_app`; starts and ends the feed with the application.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.watcher = Watcher(lambda token: service.loaded.texts.text(token))
        self.feed = Feed(self._snapshot, lambda: service.is_draining, self.watcher.count)
        service.when_loaded.append(self._watch)
        self.router = APIRouter(lifespan=self._lifespan, include_in_schema=False)
        for path, (name, kind) in _FILES.items():
            self._add_file(path, name, kind)
        self.router.add_api_route("/dashboard/events", self._events, methods=["GET"], response_class=Response)

    def _watch(self, loaded: Loaded) -> None:
        loaded.tenants.when_made(self.watcher.watch)

    def _snapshot(self, tenant: str) -> dict[str, object]:
        status, health = self._service.health()
        state = {"model": self._service.settings.model_name, "status": health["status"], "ok": status == 200}
        return state | self.watcher.snapshot(tenant)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.feed.start()
        yield
        await asyncio.to_thread(self.feed.close)

    def _add_file(self, path: str, name: str, kind: str) -> None:
        content = (files(__package__) / "static" / name).read_bytes()

        async def read() -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        self.router.add_api_route(path, read, methods=["GET"], response_class=Response)

    async def _events(self, request: Request) -> Response:
        events, gone = self.feed.subscribe(request.state.tenant)
        return EventStream(events, gone, self._service.settings.send_seconds)
