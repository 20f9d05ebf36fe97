from __future__ import annotations

import asyncio
from typing import Any

import pytest

from retrieval_draft.draft_service.app import DraftApp
from retrieval_draft.http.body_limit import BodyLimit
from tests.support.draft_services import draft_service, error_of_body

PATH = "/v1/draft/open"


def answer(app: Any, *parts: bytes, late: bool = False, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Any:
    """Status, body and headers for a request whose body comes in parts."""
    waiting = list(parts)
    sent: list[Any] = []

    async def receive() -> Any:
        if not waiting and late:
            await asyncio.sleep(60)
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting) or late}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def test_the_drafting_service_tells_why_an_outer_limit_refused_a_body() -> None:
    with draft_service() as service:
        app = DraftApp(service)
        try:
            announced = ((b"content-length", b"51"),)
            for status, body, found in (
                answer(BodyLimit(app, 50), b"x" * 30, b"x" * 30, b"x"),
                answer(BodyLimit(app, 50), b"x", b"x", headers=announced),
            ):
                assert (status, found[b"connection"]) == (413, b"close")
                assert error_of_body(body).message.startswith("The body has more than 50 bytes")
            status, body, _ = answer(BodyLimit(app, 50, seconds=0.05), b"x", late=True)
            assert (status, error_of_body(body).code) == (408, 408)
        finally:
            app.close()


@pytest.mark.parametrize(("size", "status"), [(50, 400), (51, 413)])
def test_a_body_of_the_limit_is_read(size: int, status: int) -> None:
    with draft_service() as service:
        app = DraftApp(service, max_body=50)
        assert answer(app, b"\xc1" * size)[0] == status
        app.close()
