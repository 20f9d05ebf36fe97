"""Ended requests leave nothing behind: no object in a circle, no structure that grows with their number."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.support.raw_http import exchange, post
from tests.support.scripted import scripted_server
from tests.support.servers import MODEL, Running

CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "a"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look"}}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def said(number: int, **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"say {number}"}],
        "max_tokens": 40,
        **more,
    }


ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, said(0)),
    "samples": (CHAT, said(0, n=2, temperature=1, seed=1, stop=["zz"], logprobs=True)),
    "stop string": (CHAT, said(0, stop="plain")),
    "tools": (CHAT, said(1, tools=TOOLS)),
    "text": (TEXT, {"model": MODEL, "prompt": "ab", "max_tokens": 5, "echo": True, "logprobs": 2}),
    "texts": (TEXT, {"model": MODEL, "prompt": ["ab", "cd"], "max_tokens": 5, "documents": ["ab cd"]}),
    "response": (RESPONSES, {"model": MODEL, "input": "say 0"}),
    "choice": (CHAT, said(2, guided_choice=["yes", "no"])),
    "bad field": (CHAT, said(0, n=1000)),
    "bad prompt": (TEXT, {"model": MODEL, "prompt": "x" * 5000}),
    "bad grammar": (CHAT, said(0, guided_regex="(")),
    "too many": (TEXT, {"model": MODEL, "prompt": "ab", "n": 16, "temperature": 1}),
    "other model": (CHAT, said(0, model="other")),
}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with scripted_server(["A plain text.", CALL, "yes"]) as made:
        yield made


def ask(running: Running, path: str, body: dict[str, Any], stream: bool) -> None:
    """A request on a connection of its own."""
    told = httpx.post(f"{running.url}{path}", json={**body, "stream": stream}, timeout=60)
    assert told.status_code in (200, 400, 404)


def leave(running: Running, path: str, body: dict[str, Any]) -> None:
    """A request whose client hangs up at once."""
    exchange((running.host, running.port), post(path, {**body, "stream": True}), seconds=0.01)


def is_quiet(running: Running) -> bool:
    until = time.monotonic() + 10
    while running.server.server_state.tasks and time.monotonic() < until:
        time.sleep(0.01)
    return running.wait_idle() and not running.server.server_state.tasks


@pytest.mark.parametrize("name", ASKS)
def test_no_object_waits_for_a_collection(running: Running, name: str) -> None:
    """A circle keeps inputs, keys and grammars of requests until a collection, which stops all threads."""
    if "grammar" in name or name == "choice":
        pytest.importorskip("llguidance")
    path, body = ASKS[name]
    for stream in (False, True):
        ask(running, path, body, stream)
    left = path != RESPONSES and name in ("chat", "text", "tools")
    if left:
        leave(running, path, body)
    assert is_quiet(running)
    gc.collect()
    gc.disable()
    try:
        for stream in (False, True, False, True):
            ask(running, path, body, stream)
        if left:
            leave(running, path, body)
        assert is_quiet(running)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    own = {kind: number for kind, number in kinds.items() if kind.startswith(("retrieval_draft", "torch"))}
    assert not own, json.dumps(kinds.most_common(20))


def test_no_structure_grows_with_the_number_of_requests(running: Running) -> None:
    def round_of_all() -> Counter[str]:
        for path, body in ASKS.values():
            for stream in (False, True):
                ask(running, path, body, stream)
        assert is_quiet(running)
        gc.collect()
        return Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())

    logging.disable()  # pytest keeps what is logged
    try:
        for _ in range(2):
            round_of_all()
        counts = [round_of_all() for _ in range(4)]
    finally:
        logging.disable(logging.NOTSET)
    # What was learned may grow up to its limits, texts of tokens are kept once seen, and retired segments for
    # a second; but not every round adds objects for half of its requests.
    steps = [after - before for before, after in pairwise(counts)]
    least = len(ASKS)
    grown = {kind: number for kind in steps[0] if (number := min(step[kind] for step in steps)) >= least}
    assert not grown
