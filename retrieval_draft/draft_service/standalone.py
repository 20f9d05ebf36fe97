"""The drafting service as a server of its own, without a model."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from retrieval_draft.draft_service.app import PREFIX, DraftApp
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.http.head_requests import HeadAsGet
from retrieval_draft.http.json_response import Json, error_body

if TYPE_CHECKING:
    from retrieval_draft.server.observability.metrics import ServerMetrics

__all__ = ["StandaloneApp", "serve"]

_KEEP_ALIVE_SECONDS = 75
_GRACE_SECONDS = 10
_BACKLOG = 1024


class StandaloneApp:
    """``/v1/draft``, ``/health`` and ``/metrics``. Closes the service when the server ends.

    Args:
        drafts: Answers ``/v1/draft``, without a framework before it.
        metrics: Answers ``/metrics``; None for no metrics.
    """

    def __init__(self, drafts: DraftApp, metrics: ServerMetrics | None = None) -> None:
        def health(_: Request) -> Json:
            states = {
                proposer.store.health.state
                for proposer in proposers.made.values()
                if proposer.store is not None
            }
            status = "ok" if states <= {"connected"} else "degraded"
            return Json({"status": status, "sessions": len(drafts.service.table)})

        def read_metrics(_: Request) -> Response:
            body, kind = metrics.render() if metrics is not None else (b"", "")
            return Response(body, headers={"Content-Type": kind})

        def missing(request: Request, _: Exception) -> Json:
            return Json(error_body(404, f"There is nothing at {request.url.path}."), 404)

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            drafts.close()
            drafts.service.close()

        proposers = drafts.service.proposers
        routes = [Route("/health", health)] + [Route("/metrics", read_metrics)] * (metrics is not None)
        rest = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: missing})
        self._drafts, self._rest = HeadAsGet(drafts), HeadAsGet(rest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or handles the server's lifespan events."""
        is_draft = scope["type"] == "http" and str(scope["path"]).startswith(PREFIX)
        await (self._drafts if is_draft else self._rest)(scope, receive, send)


def serve(app: StandaloneApp, *, host: str | None, port: int, unix_socket: Path | None) -> None:
    """Serves until SIGINT or SIGTERM, and finishes running requests.

    Args:
        app: The application.
        host: Address to listen on; None with a socket.
        port: With `host`; 0 for a free one.
        unix_socket: A path instead; only this user may connect. A stale one is replaced.
    """
    import uvicorn

    from retrieval_draft.http.protocol import http_config

    listener = _listen(host, port, unix_socket)
    config = http_config(
        app,
        log_level="warning",
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    name = listener.getsockname()
    where = f"unix://{name}" if unix_socket is not None else _url(name[0], name[1])
    try:
        print(f"Drafts at {where}", flush=True)
        # uvicorn raises the signal that ended it again, which must not prevent the clean-up.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def _listen(host: str | None, port: int, path: Path | None) -> socket.socket:
    try:
        if path is None:
            family = socket.AF_INET6 if ":" in str(host) else socket.AF_INET
            made = socket.create_server((str(host), port), family=family, backlog=_BACKLOG)
        else:
            _clear(path)
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(path))
            path.chmod(0o600)
            made.listen(_BACKLOG)
    except OSError as error:
        raise InvalidInputError(f"Cannot listen on {path or f'{host}:{port}'}: {error}.") from error
    made.setblocking(False)
    return made


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _clear(path: Path) -> None:
    """Removes a socket without a server."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
