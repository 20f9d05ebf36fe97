from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from retrieval_draft.cli import main
from retrieval_draft.draft_service.app import DraftApp
from retrieval_draft.draft_service.standalone import StandaloneApp, serve
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.observability.metrics import ServerMetrics
from tests.support.draft_services import call, draft_service


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Which ids are there?"),
        (["--vocabulary", "9", "--host", "0.0.0.0"], "Everybody who can reach 0.0.0.0"),
        (["--vocabulary", "9", "--api-key", "short"], "fewer than 8"),
        (["--vocabulary", "9", "--store", "no-url"], "The store is no URL"),
        (["--vocabulary", "9", "--index", "nowhere"], "tokenizer"),
    ],
)
def test_what_cannot_be_served(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["drafts", "serve", *words])
    assert done.value.code == 1
    assert message in capsys.readouterr().err


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    nothing: Any = None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError, match=f"127.0.0.1:{port}"):
            serve(nothing, host="127.0.0.1", port=port, unix_socket=None)
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(InvalidInputError, match=r"s\.sock"):
            serve(nothing, host=None, port=0, unix_socket=path)
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(InvalidInputError, match="file"):
        serve(nothing, host=None, port=0, unix_socket=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a socket"


def test_health_metrics_and_nothing_else() -> None:
    with draft_service() as service:
        drafts = DraftApp(service)
        app = StandaloneApp(drafts, ServerMetrics())
        status, _, body = call(app, "/health", method="GET")
        assert (status, json.loads(body)) == (200, {"status": "ok", "sessions": 0})
        assert b"retrieval_draft:" in call(app, "/metrics", method="GET")[2]
        assert call(app, "/", method="GET")[0] == 404
        assert call(StandaloneApp(drafts), "/metrics", method="GET")[0] == 404
        assert call(app, "/v1/draft", method="GET")[0] == 200
        drafts.close()


def test_the_service_ends_with_the_server() -> None:
    with draft_service() as service:
        app = StandaloneApp(DraftApp(service))
        incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        sent: list[str] = []

        async def receive() -> Any:
            return incoming.pop(0)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        asyncio.run(app({"type": "lifespan"}, receive, send))
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert service._stopped.is_set()
