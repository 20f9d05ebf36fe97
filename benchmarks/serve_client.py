"""One client of a server: sends a request, and checks that the answer is complete and its own."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.loopback import posted

__all__ = ["Ask", "Told", "ask_server"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer is known beforehand.

    Attributes:
        prompt: Text.
        seed: Of the sampling.
        max_tokens: Of the reply.
        temperature: 0 is greedy.
    """

    prompt: str
    seed: int
    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Told:
    """An answer.

    Attributes:
        tokens: Ids of the reply.
        text: Of the reply.
        wrong: Fault of its form; empty without one.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    wrong: str = ""


def ask_server(port: int, ask: Ask, *, stream: bool, name: str, timeout: float = 300.0) -> Told:
    """Sends one request on a connection of its own.

    Args:
        port: On loopback.
        ask: The request.
        stream: Whether tokens are streamed.
        name: Of the request, which the answer must contain.
        timeout: Seconds without data.
    """
    body = {
        "prompt": ask.prompt, "seed": ask.seed, "max_tokens": ask.max_tokens,
        "temperature": ask.temperature, "stream": stream, "return_token_ids": True,
    }  # fmt: skip
    try:
        with posted(port, "/v1/completions", body, {"X-Request-Id": name}, timeout) as response:
            if response.status != 200:
                return Told(wrong=f"status {response.status}: {response.read(300)!r}")
            if (echoed := response.getheader("X-Request-Id")) != name:
                return Told(wrong=f"it is the answer of {echoed}")
            return _pieces(response) if stream else _whole(json.loads(response.read()))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Told(wrong=f"{type(error).__name__}: {error}")


def _whole(body: dict[str, Any]) -> Told:
    (choice,) = body["choices"]
    wrong = "" if choice["finish_reason"] in ("stop", "length") else "it has no end"
    return Told(tuple(choice["token_ids"]), choice["text"], wrong)


def _pieces(response: http.client.HTTPResponse) -> Told:
    tokens: list[int] = []
    ids: set[str] = set()
    text, ended, done = "", 0, False
    for data in _events(response):
        if done:
            return Told(wrong="something comes behind [DONE]")
        if data == "[DONE]":
            done = True
            continue
        piece = json.loads(data)
        if "error" in piece:
            return Told(wrong=f"error {piece['error']}")
        ids.add(piece["id"])
        if len(ids) > 1:
            return Told(wrong=f"pieces of two answers are mixed: {ids}")
        for choice in piece["choices"]:
            text += choice["text"]
            tokens += choice["token_ids"]
            ended += choice["finish_reason"] is not None
    wrong = "" if done and ended == 1 else f"the stream was cut: {ended} ends, [DONE] {done}"
    return Told(tuple(tokens), text, wrong)


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        text = line.decode().rstrip("\n")
        if text.startswith("data: "):
            yield text.removeprefix("data: ")
