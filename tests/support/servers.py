"""A server of a tiny model on a loopback port, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.http.keys import KeyRing
from retrieval_draft.http.protocol import http_config
from retrieval_draft.server.full_app import create_full_app
from retrieval_draft.server.service import Service
from retrieval_draft.server.settings import ServerSettings
from tests.support.models import make
from tests.support.tokenizers_for_tests import byte_level

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PAIRS = ("ab", "cd", "ef", "gh", "abc", "Ġa", "Ġb")
MODEL = "tiny"


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = byte_level(PAIRS)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(tokenizer: Any, **options: Any) -> Any:
    return make("llama", vocab_size=len(tokenizer), **options)


def tiny_drafter(model: Any, tokenizer: Any, **options: Any) -> RetrievalDrafter:
    config = DraftConfig(nodes=6, adjacency_rows=1024, **options)
    return RetrievalDrafter.for_model(model, tokenizer, config=config)


class Running:
    """A server that runs on a thread."""

    def __init__(self, service: Service, url: str, server: uvicorn.Server) -> None:
        self.service, self.url, self.server = service, url, server
        self.host, self.port = "127.0.0.1", int(url.rsplit(":", 1)[1])

    @property
    def engine(self) -> Any:
        return self.service.loaded.engine

    def wait_idle(self, seconds: float = 60.0) -> bool:
        """True if nothing runs or waits within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.service.is_idle and not self.engine._choices and not self.engine._joining:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(
    drafter: RetrievalDrafter,
    tokenizer: Any,
    *,
    keys: dict[str, str] | None = None,
    listeners: Any = (),
    processor: Any = None,
    adapters: Any = None,
    **settings: Any,
) -> Iterator[Running]:
    """The server that is shipped, on a free port, which ends with the block."""
    service = Service(
        ServerSettings(MODEL, **settings),
        lambda: (drafter, tokenizer),
        keys=KeyRing(keys or {}),
        load_processor=None if processor is None else lambda: processor,
        adapters=adapters,
    )
    app = create_full_app(service, listeners)
    config = http_config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 120
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        service.wait(120)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(service, f"http://127.0.0.1:{port}", server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


def tokens_of(response: httpx.Response) -> list[list[int]]:
    """The token ids of each choice of a reply."""
    assert response.status_code == 200, response.text
    return [choice["token_ids"] for choice in response.json()["choices"]]


def tokens_and_known(
    running: Running, prompt: list[int], key: str = "one", **fields: Any
) -> tuple[list[int], int]:
    """A greedy reply's tokens, and the number of the prompt's that the server knew."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(
        f"{running.url}/v1/completions",
        json={**body, "ignore_eos": True, **fields},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )
    [tokens] = tokens_of(answer)
    return tokens, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
