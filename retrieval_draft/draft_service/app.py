"""The drafting service over HTTP: a plain ASGI application, as a framework would cost more than a draft."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.errors import DraftServiceError, NotAllowedError, error_of
from retrieval_draft.draft_service.service import DraftService, failure_of
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.http.body_headers import media_type, unreadable
from retrieval_draft.http.body_limit import bounded
from retrieval_draft.http.event_stream import unless_gone
from retrieval_draft.http.fair_pool import FairPool

__all__ = ["PREFIX", "Authenticate", "DraftApp"]

Authenticate = Callable[["str | None"], "str | None"]
"""The tenant of a request by its Authorization header; None if it is to be refused."""

Reply = wire.Info | wire.OpenReply | wire.StepReply
Result = TypeVar("Result")
PREFIX = "/v1/draft"
_THREADS = 16
_KINDS = (wire.MESSAGE_PACK, wire.JSON, "application/x-msgpack", "application/vnd.msgpack", "")
_QUICK_NODES, _QUICK_TOKENS = 256, 64
_log = logging.getLogger("retrieval_draft")


class DraftApp:
    """``/v1/draft``, by itself or mounted.

    ``GET /v1/draft`` describes the service, ``POST /v1/draft/open`` starts a session and ``POST
    /v1/draft/step`` makes a step of one or many. A step of one session runs on the event loop if no other
    runs, as moving it to a thread takes about as long as the step; all else runs on threads.

    Args:
        service: The drafting service. It is not closed here.
        authenticate: Returns the tenant of a key; None to read it from ``state["tenant"]``, which an outer
            application sets, and to use "default" without one.
        max_body: Limit of a request in bytes.
        body_seconds: Limit for receiving a request's body.
    """

    def __init__(
        self,
        service: DraftService,
        authenticate: Authenticate | None = None,
        max_body: int = 8 << 20,
        body_seconds: float = 60.0,
    ) -> None:
        self.service = service
        self._authenticate = authenticate
        self._max_body = max_body
        self._body_seconds = body_seconds
        # Tenants do not wait for each other, nor steps for sessions that are being opened.
        self._pool = FairPool(_THREADS, "retrieval-draft-drafts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"The drafting service does not speak {scope['type']}.")
        json = False
        receive = bounded(scope, receive, self._max_body, self._body_seconds)
        try:
            headers = dict(scope["headers"])
            json = _is_json(headers.get(b"content-type", b""))
            tenant = self._tenant(scope, headers)
            reply: Reply | wire.ErrorReply = await self._answer(scope, receive, tenant, json)
            status = 200
        except (RetrievalDraftError, HTTPException) as error:
            known = error_of(error.status_code, error.detail) if isinstance(error, HTTPException) else error
            reply = wire.ErrorReply(failure_of(known))
            status = reply.error.code
        except _LeftError:
            return
        except Exception:
            _log.exception("A request to the drafting service failed.")
            reply = wire.ErrorReply(wire.Failure("The service failed.", "server_error", 500))
            status = 500
        if isinstance(reply, wire.ErrorReply):
            self.service.observer.failed(status)
        await _respond(send, status, wire.encode(reply, json), json)
        if isinstance(reply, wire.StepReply):  # while the engine verifies
            if len(reply.drafts) > 1:
                await self._in_thread(("", "settle"), self.service.apply_feedback)
            else:
                self.service.apply_feedback()

    def close(self) -> None:
        """Ends the threads, after their running calls."""
        self._pool.close(wait=True)

    def _tenant(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        if self._authenticate is None:
            state: dict[str, Any] = scope.get("state") or {}
            return str(state.get("tenant", "default"))
        given = headers.get(b"authorization")
        tenant = self._authenticate(None if given is None else given.decode("latin-1"))
        if tenant is None:
            raise NotAllowedError("The API key is missing or wrong.", "Send it as Authorization: Bearer KEY.")
        return tenant

    async def _answer(self, scope: Scope, receive: Receive, tenant: str, json: bool) -> Reply:
        name = str(scope["path"]).rpartition(PREFIX)[2].rstrip("/")
        method = "POST" if name in ("/open", "/step") else "GET"
        if name not in ("", "/open", "/step"):
            raise error_of(404, f"There is no {PREFIX}{name}.", "There are /open and /step.")
        if scope["method"] != method:
            raise error_of(405, f"{PREFIX}{name} takes {method}, not {scope['method']}.")
        if not name:
            return await self._in_thread((tenant, "step"), self.service.info, tenant)
        why = unreadable(scope["headers"], _KINDS)
        if why is not None:
            raise error_of(415, why)
        body = await _body(receive)
        if name == "/open":
            opening = self._in_thread((tenant, "open"), self._open, tenant, body, json)
            if len(body) <= wire.SMALL:
                return await opening
            opened = await unless_gone(receive, opening)
            if opened is None:
                raise _LeftError
            return opened
        if len(body) > wire.SMALL:
            request = await self._in_thread((tenant, "step"), _read, body, wire.StepRequest, json)
        else:
            request = _read(body, wire.StepRequest, json)
        steps = request.steps
        if len(steps) > 1:
            return wire.StepReply(await self._in_thread((tenant, "step"), self.service.steps, tenant, steps))
        step = steps[0]
        quick = step.nodes <= _QUICK_NODES and len(step.tokens) <= _QUICK_TOKENS and step.close is None
        if quick and self.service.is_free(tenant, step.session):
            return wire.StepReply([self.service.step(tenant, step)])
        return wire.StepReply([await self._in_thread((tenant, "step"), self.service.step, tenant, step)])

    def _open(self, tenant: str, body: bytes, json: bool) -> wire.OpenReply:
        return self.service.open(tenant, _read(body, wire.OpenRequest, json))

    async def _in_thread(self, lane: tuple[str, str], call: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.wrap_future(self._pool.submit(lane, partial(call, *arguments)))


class _LeftError(Exception):
    """The client hung up before the end of its request."""


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    message: Message = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            raise _LeftError
        parts.append(message.get("body", b""))
    return b"".join(parts)  # one part is not copied


def _read(body: bytes, kind: type[wire.Message], json: bool) -> wire.Message:
    try:
        return wire.decode(body, kind, json)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DraftServiceError(
            f"The body is no such message: {error}.",
            f"Send {wire.JSON if json else wire.MESSAGE_PACK} of format version {wire.VERSION}.",
        ) from error


def _is_json(content_type: bytes) -> bool:
    return media_type(content_type) == wire.JSON


async def _respond(send: Send, status: int, body: bytes, json: bool) -> None:
    headers = [
        (b"content-type", (wire.JSON if json else wire.MESSAGE_PACK).encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
