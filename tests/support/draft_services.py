"""Drafting services for tests: without a network, and as plain ASGI calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from retrieval_draft.config import DraftConfig
from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.app import DraftApp
from retrieval_draft.draft_service.limits import SessionLimits
from retrieval_draft.draft_service.service import DraftService
from retrieval_draft.draft_service.tenants import Proposers
from retrieval_draft.proposer import Proposer

VOCABULARY = 64


class Watcher:
    """A `DraftObserver` that remembers."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed: Counter[str] = Counter()
        self.steps: list[tuple[int, int, int]] = []
        self.statuses: list[int] = []

    def session_opened(self, seconds: float) -> None:
        self.opened += 1

    def session_closed(self, reason: str) -> None:
        self.closed[reason] += 1

    def stepped(self, emitted: int, accepted: int, nodes: int, seconds: float) -> None:
        self.steps.append((emitted, accepted, nodes))

    def failed(self, status: int) -> None:
        self.statuses.append(status)


@contextmanager
def draft_service(watcher: Watcher | None = None, **limits: Any) -> Iterator[DraftService]:
    config = DraftConfig(adjacency_rows=1024)
    proposers = Proposers(lambda tenant: Proposer.for_tokenizer(None, vocabulary=VOCABULARY, config=config))
    service = DraftService(proposers, SessionLimits(**limits), watcher)
    try:
        yield service
    finally:
        service.close()
        assert len(service.table) == 0
        assert service.table.tokens == 0


def call(
    app: Any,
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    headers: tuple[tuple[str, str], ...] = (),
    json: bool = False,
) -> tuple[int, dict[str, str], bytes]:
    """One request to an ASGI application: status, headers, body."""
    sent: list[dict[str, Any]] = []
    given = (("content-type", wire.JSON if json else wire.MESSAGE_PACK), *headers)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given],
    }
    incoming = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return incoming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert int(found["content-length"]) == len(sent[1]["body"])
    return sent[0]["status"], found, sent[1]["body"]


def post(app: DraftApp, path: str, message: msgspec.Struct, **options: Any) -> tuple[int, bytes]:
    status, _, body = call(app, path, wire.encode(message, options.get("json", False)), **options)
    return status, body


def error_of_body(body: bytes, json: bool = False) -> wire.Failure:
    return wire.decode(body, wire.ErrorReply, json).error
