"""Requests of every kind for one server: chats, tools, JSON, images, and those that it must refuse."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BAD_ASKS", "MixedAsk", "make_mixed_asks"]

_CHAT, _TEXTS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_WORDS = (
    "the", "sea", "is", "a", "sky", "of", "cats", "that", "look", "for", "file", "in", "old", "town", "run",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class MixedAsk:
    """A request.

    Attributes:
        kind: Of what it asks for.
        path: Of the endpoint.
        body: Without ``stream``.
        fault: Fault of a reply that ended by itself; empty without one.
    """

    kind: str
    path: str
    body: dict[str, Any]
    fault: Callable[[dict[str, Any]], str] = lambda choice: ""


def make_mixed_asks(count: int, seed: int = 0) -> list[MixedAsk]:
    """Requests of all kinds in turns, one in three of them greedy."""
    draw = random.Random(seed)
    makers = (_chat, _text, _long_chat, _tools, _call, _schema, _choice, _image, _samples, _response)
    asks = []
    for number in range(count):
        sampled = {"temperature": draw.choice((0.5, 1.0)), "seed": draw.randrange(1 << 40)}
        sampling = {"temperature": 0} if number % 3 == 0 else sampled
        asks.append(makers[number % len(makers)](draw, number, sampling))
    return asks


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))


def _user(text: Any, system: str = "") -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": text}]}


def _limits(draw: random.Random, most: int = 96) -> dict[str, Any]:
    return {"max_tokens": draw.randint(4, most), "return_token_ids": True}


def _chat(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    body = _user(_words(draw, 1, 30), " ".join(_WORDS)) | _limits(draw) | sampling
    return MixedAsk("chat", _CHAT, body)


def _text(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    return MixedAsk("text", _TEXTS, {"prompt": _words(draw, 1, 40)} | _limits(draw) | sampling)


def _long_chat(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    return MixedAsk("long chat", _CHAT, _user(_words(draw, 400, 800)) | _limits(draw) | sampling)


def _tool(name: str, draw: random.Random) -> dict[str, Any]:
    properties = {
        "path": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": draw.randint(10, 9999)},
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    described = {"name": name, "parameters": parameters | {"additionalProperties": False}}
    return {"type": "function", "function": described}


def _tools(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    body = _user(_words(draw, 1, 20)) | {"tools": [_tool("look", draw), _tool("run", draw)]}
    return MixedAsk("tools", _CHAT, body | _limits(draw) | sampling)


def _call(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    body = _user(_words(draw, 1, 20)) | {"tools": [_tool("look", draw), _tool("run", draw)]}
    body |= {"tool_choice": "required", "parallel_tool_calls": False}
    return MixedAsk("call", _CHAT, body | _limits(draw, 160) | sampling, _call_fault)


def _call_fault(choice: dict[str, Any]) -> str:
    if len(choice["calls"]) != 1 or choice["calls"][0][0] not in ("look", "run"):
        return f"the calls are {choice['calls']}"
    return "" if set(json.loads(choice["calls"][0][1])) == {"path", "count"} else "arguments lack a key"


def _schema(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    names = [f"key_{number}_{index}" for index in range(draw.randint(1, 8))]
    values: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"enum": ["cat", "catalog", None]},
        {"type": "integer", "maximum": 99, "minimum": 0},
        {"type": "string", "maxLength": 5},
        {"type": "array", "items": {"const": "ü"}, "maxItems": 3},
    ]
    properties = {name: draw.choice(values) for name in names}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    body = _user(_words(draw, 1, 20)) | {"response_format": form} | _limits(draw, 256) | sampling

    def fault(choice: dict[str, Any]) -> str:
        return "" if list(json.loads(choice["content"])) == names else "the object has other keys"

    return MixedAsk("schema", _CHAT, body, fault)


def _choice(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    choices = ["yes", "yesterday", "no", f"{number} 日本"]
    body = _user(_words(draw, 1, 20)) | {"structured_outputs": {"choice": choices}}

    def fault(choice: dict[str, Any]) -> str:
        return "" if choice["content"] in choices else f"{choice['content']!r} is no choice"

    return MixedAsk("choice", _CHAT, body | {"max_tokens": 32, "return_token_ids": True} | sampling, fault)


def _image(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    images = [_picture(draw, draw.choice((16, 64, 900))) for _ in range(draw.randint(1, 2))]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    body = _user([{"type": "text", "text": _words(draw, 1, 20)}, *parts])
    return MixedAsk("image", _CHAT, body | _limits(draw) | sampling)


def _picture(draw: random.Random, side: int) -> str:
    from PIL import Image

    pixels = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _samples(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    body = _user(_words(draw, 1, 20)) | {"n": 2, "stop": ["zz"]} | _limits(draw) | sampling
    return MixedAsk("samples", _CHAT, body)


def _response(draw: random.Random, number: int, sampling: dict[str, Any]) -> MixedAsk:
    body = {"input": _words(draw, 1, 20), "max_output_tokens": draw.randint(4, 96), **sampling}
    return MixedAsk("response", _RESPONSES, body)


_SAY = _user("the sea")
BAD_ASKS: list[tuple[str, bytes | dict[str, Any]]] = [
    (_CHAT, b"{"),
    (_CHAT, b'{"messages": 3}'),
    (_CHAT, b"\xff\xfe"),
    (_CHAT, {}),
    (_CHAT, _SAY | {"temprature": 1}),
    (_CHAT, _SAY | {"max_tokens": -1}),
    (_CHAT, _SAY | {"model": "another"}),
    (_CHAT, _SAY | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}}),
    (_CHAT, _SAY | {"structured_outputs": {"regex": "("}}),
    (_CHAT, _SAY | {"tools": [], "tool_choice": "required"}),
    (_CHAT, _SAY | {"n": 1000}),
    (_CHAT, _user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])),
    (_CHAT, _user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}])),
    (_TEXTS, {"prompt": "a " * 5000}),
    (_TEXTS, {"prompt": [1 << 40]}),
    (_RESPONSES, {"input": "the sea", "previous_response_id": "resp_1"}),
    ("/v1/embeddings", {"input": "the sea"}),
    ("/v1/nothing", {}),
]
"""Paths and bodies of requests that are answered with an error of the client's."""
