"""Authentication and admission of every request: its id, its key, and the limits of open requests."""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.service import Service

__all__ = ["AuthMiddleware"]

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("retrieval_draft.server")


class AuthMiddleware:
    """Middleware: request ids, API keys, and refusal of requests beyond the limits.

    ``scope["state"]`` gets ``request_id``, the server's own, ``client_id``, the client's ``X-Request-Id`` if
    that is a name, and ``tenant``. The client's id is echoed and logged, and has no other use.

    Args:
        app: The next application.
        service: Has the keys and the state of the server.
        public: Paths that need no key.
    """

    def __init__(self, app: ASGIApp, service: Service, public: frozenset[str]) -> None:
        self._app, self._service, self._public = app, service, public
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        # The server uses an id of its own: two clients may send the same one.
        request_id = secrets.token_hex(12)
        client_id = given if _ID.fullmatch(given) else None
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"], state["client_id"] = request_id, client_id
        state["tenant"] = self._service.keys.default
        echoed = (client_id or request_id).encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", echoed)]
            await send(message)

        error = self._refusal(scope, headers, state)
        if error is not None:
            await _send_error(error, named)
            return
        counted = scope["method"] == "POST"
        tenant = state["tenant"]
        self._open[tenant] += counted
        try:
            await self._app(scope, receive, named)
        finally:
            self._open[tenant] -= counted

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], state: dict[str, Any]) -> ApiError | None:
        service, path = self._service, scope["path"]
        if path not in self._public:
            tenant = service.keys.tenant(headers.get(b"authorization", b"").decode("latin-1") or None)
            if tenant is None:
                return ApiError(401, "The API key is missing or wrong; send Authorization: Bearer KEY.")
            state["tenant"] = tenant
        if scope["method"] != "POST":
            return None
        if service.is_draining:
            return ApiError(503, "The server is about to stop.", retry_after=5)
        every, mine = self._open.total(), self._open[state["tenant"]]
        if every >= service.choices_limit or mine >= service.tenant_limit:
            return ApiError(429, f"{every} requests are open already, {mine} of this tenant.", retry_after=1)
        return None


async def _send_error(error: ApiError, send: Send) -> None:
    """Sends an error as a whole response. The connection closes, as a body may not have been read."""
    body = msgspec.json.encode(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers(),
    }
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
