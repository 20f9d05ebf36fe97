"""The drafting service as a server of its own: no model, no framework."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from retrieval_draft.draft_service.app import PREFIX, DraftApp, Receive, Scope, Send
from retrieval_draft.http.head_requests import HeadAsGet

if TYPE_CHECKING:
    from retrieval_draft.server.observability.metrics import ServerMetrics

__all__ = ["StandaloneApp", "serve"]

_KEEP_ALIVE_SECONDS = 75
_GRACE_SECONDS = 10


class StandaloneApp:
    """``/v1/draft``, ``/health`` and ``/metrics``. Closes the service when the server ends.

    Args:
        drafts: Answers ``/v1/draft``.
        metrics: Answers ``/metrics``; None for no metrics.
    """

    def __init__(self, drafts: DraftApp, metrics: ServerMetrics | None = None) -> None:
        self._drafts, self._metrics = drafts, metrics
        self._with_head = HeadAsGet(self._serve)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or handles the server's lifespan events."""
        await self._with_head(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif str(scope["path"]).startswith(PREFIX):
            await self._drafts(scope, receive, send)
        else:
            await self._other(scope, send)

    async def _other(self, scope: Scope, send: Send) -> None:
        status, kind, body = 404, "application/json", b'{"error":{"message":"Not found.","code":404}}'
        if scope["path"] == "/health":
            service = self._drafts.service
            states = {
                tenant: proposer.store.health.state
                for tenant, proposer in service.proposers.made().items()
                if proposer.store is not None
            }
            degraded = any(state != "connected" for state in states.values())
            health = {"status": "degraded" if degraded else "ok", "sessions": len(service.table)}
            status, body = 200, msgspec.json.encode(health)
        elif scope["path"] == "/metrics" and self._metrics is not None:
            body, kind = self._metrics.render()
            status = 200
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._drafts.close()
                self._drafts.service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


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
    from retrieval_draft.errors import InvalidInputError

    try:
        if path is None:
            family = socket.AF_INET6 if ":" in str(host) else socket.AF_INET
            made = socket.socket(family)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.bind((host, port))
        else:
            _clear(path)
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(path))
            path.chmod(0o600)
        made.listen(1024)
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
