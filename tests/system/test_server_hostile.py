"""Requests meant to break a server: each is refused by its field or answered, and nobody else notices."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from benchmarks.mixed_model import save_mixed_model
from retrieval_draft.server.media.settings import MediaSettings
from tests.support.raw_http import exchange, post
from tests.support.servers import Running, serving, tiny_drafter

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SECONDS = 20.0
"""Far above what any of them takes, far below what one that is not bounded would."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: Any) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    save_mixed_model(folder / "model")
    images = folder / "images"
    images.mkdir()
    (folder / "secret.png").write_bytes(png(4, 4))
    (images / "link.png").symlink_to(folder / "secret.png")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    drafter = tiny_drafter(model, tokenizer)
    with serving(
        drafter, tokenizer, processor=processor, tool_parser="hermes",
        media=MediaSettings(folder=images, fetches=True),
    ) as made:  # fmt: skip
        yield made


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    """A PNG that claims to have some size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    filled = pixels or bytes((3 * width + 1) * height)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(filled)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture(form: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, form)
    return out.getvalue()


def said(content: Any = "the sea", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **more}


def shown(url: str) -> dict[str, Any]:
    return said([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}])


def data(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return shown(f"data:{kind};base64,{base64.b64encode(content).decode()}")


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return said(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": value, **more}}
    )


def called(arguments: str) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}


def tools(*names: str, **more: Any) -> dict[str, Any]:
    return said(tools=[{"type": "function", "function": {"name": name}} for name in names], **more)


def biases(count: int, bias: int) -> dict[str, int]:
    return dict.fromkeys(map(str, range(count)), bias)


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


def doubled(count: int) -> dict[str, Any]:
    """A schema of some hundred lines, written out 2 ** count of them."""
    parts = {
        f"a{index}": {
            "type": "object",
            "properties": {key: {"$ref": f"#/$defs/a{index + 1}"} for key in "xy"},
        }
        for index in range(count)
    }
    return {"$defs": {**parts, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


CHAINED: dict[str, Any] = {f"a{index}": {"$ref": f"#/$defs/a{index + 1}"} for index in range(3000)}
CHAINED["a3000"] = {"type": "string"}
LOOPED = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
OPTIONAL = {"type": "object", "properties": {f"k{index}": {"type": "string"} for index in range(3000)}}
MANY = [str(index) * 3 for index in range(4096)]

BODIES: dict[str, tuple[str, Any, str | None]] = {
    "no UTF-8": (TEXT, b'{"prompt": "\xff\xfe"}', "prompt"),
    "overlong UTF-8": (TEXT, b'{"prompt":"\xc0\xaf"}', "prompt"),
    "half a pair as bytes": (TEXT, b'{"prompt":"\xed\xa0\x80"}', "prompt"),
    "half a pair": (TEXT, b'{"prompt":"\\ud800"}', None),
    "no UTF-8 in a key": (TEXT, b'{"\xc3\x28": 1}', None),
    "UTF-16": (TEXT, '{"prompt":"a"}'.encode("utf-16"), None),
    "a byte order mark": (TEXT, b'\xef\xbb\xbf{"prompt":"a"}', None),
    "nothing": (TEXT, b"", None),
    "more after it": (TEXT, b'{"prompt":"a"}x', None),
    "NaN": (TEXT, b'{"prompt":"a","temperature":NaN}', None),
    "infinity": (TEXT, b'{"prompt":"a","temperature":Infinity}', None),
    "beyond a double": (TEXT, b'{"prompt":"a","temperature":1e999}', "temperature"),
    "many digits": (TEXT, b'{"prompt":"a","seed":' + b"9" * 400_000 + b"}", "seed"),
    "digits in a schema": (CHAT, said(json_schema='{"const":' + "9" * 5000 + "}"), "json_schema"),
    "a huge bias": (TEXT, b'{"prompt":"a","logit_bias":{"1":1e999}}', "logit_bias"),
    "many biases": (TEXT, {"prompt": "a", "logit_bias": biases(100_000, 1)}, "logit_bias"),
    "a long id": (TEXT, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "many stop strings": (TEXT, {"prompt": "a", "stop": ["x"] * 10_000}, "stop"),
    "a long stop string": (TEXT, {"prompt": "a", "stop": ["x" * 1_000_000]}, "stop"),
    "long words": (TEXT, {"prompt": "a", "bad_words": ["x" * 100_000] * 10}, "bad_words"),
    "deep": (CHAT, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "deep variables": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":'
                       + b"[" * 100_000 + b"]" * 100_000 + b"}}", None),
    "deep arguments": (CHAT, called('{"a":' + "[" * 900 + "]" * 900 + "}"), "messages"),
    "deep parameters": (CHAT, said(tools=[{"type": "function", "function": {"name": "f", "parameters":
                        nested(400)}}]), "messages"),
    "a thousand tools more": (CHAT, tools(*(f"f{index}" for index in range(2000))), "tools"),
    "a name with a line": (CHAT, tools("a\nb"), "tools"),
    "a name that is a template": (CHAT, tools("{{7*7}}"), "tools"),
    "a long name": (CHAT, tools("a" * 100_000), "tools"),
    "a name twice": (CHAT, tools("a", "a"), "tools"),
    "a model of many letters": (CHAT, said(model="\0" * 10_000), "model"),
    "a long salt": (TEXT, {"prompt": "a", "cache_salt": "\0" * 10_000}, "cache_salt"),
    "a role of many letters": (CHAT, {"messages": [{"role": "\0" * 1000, "content": "a"}]}, "messages"),
    "many messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 60_000}, "messages"),
    "variables of its own": (CHAT, said(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    "deep brackets": (CHAT, said(guided_regex="(" * 8000 + "a" + ")" * 8000), "guided_regex"),
    "deep rules": (CHAT, said(guided_grammar="start: " + "(" * 9000 + '"a"' + ")" * 9000), "guided_grammar"),
    "deep GBNF": (CHAT, said(grammar="root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "grammar"),
    "a deep schema": (CHAT, schema(nested(400)), "response_format"),
    "a deep schema as text": (CHAT, said(json_schema="[" * 100_000), "json_schema"),
    "a schema that is itself": (CHAT, schema(LOOPED), "response_format"),
    "a schema of the network": (CHAT, schema({"$ref": "http://127.0.0.1:1/a"}), "response_format"),
    "a schema of a file": (CHAT, schema({"$ref": "file:///etc/passwd"}), "response_format"),
    "many keys that may be left out": (CHAT, schema(OPTIONAL), "response_format"),
    "bounds beyond 64 bits": (CHAT, b'{"messages":[{"role":"user","content":"a"}],"response_format":{"type":'
                              b'"json_schema","json_schema":{"schema":{"const":' + b"9" * 5000 + b'}}}}',
                              "response_format"),
    "an image of 2 ** 62 pixels": (CHAT, data(png(2**31 - 1, 2**31 - 1, b"\0")), "messages"),
    "an image of 4 * 10 ** 9 pixels": (CHAT, data(png(60_000, 60_000, b"\0")), "messages"),
    "an image without its pixels": (CHAT, data(png(4000, 4000, b"\0")), "messages"),
    "an image of no pixels": (CHAT, data(png(0, 0, b"\0")), "messages"),
    "a torn image": (CHAT, data(picture("JPEG")[:-200]), "messages"),
    "an image of another form": (CHAT, data(picture("TIFF")), "messages"),
    "a program as image": (CHAT, data(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "messages"),
    "a drawing": (CHAT, data(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "messages"),
    "17 images": (CHAT, said([{"type": "image_url", "image_url": {"url": "data:,"}}] * 17), "messages"),
    "a mark beside an image": (CHAT, said([{"type": "text", "text": "<image>"},
                               data(picture("PNG"))["messages"][0]["content"][1]]), "messages"),
    "ids beyond all": ("/detokenize", {"tokens": [1 << 62]}, "tokens"),
}  # fmt: skip
"""Bodies that are refused, and the field that is named; None where the body itself is broken."""

ANSWERED: dict[str, tuple[str, Any]] = {
    "a large limit": (TEXT, b'{"prompt":"a","stop":"a","seed":1,"max_tokens":' + b"9" * 18 + b"}"),
    "zero bytes": (TEXT, {"prompt": "a\0b", "max_tokens": 2}),
    "all tokens disliked": (TEXT, {"prompt": "a", "max_tokens": 2, "logit_bias": biases(261, -100)}),
    "repetitions of repetitions": (CHAT, said(guided_regex="((a{1,1000}){1,1000}){1,1000}")),
    "stars of stars": (CHAT, said(guided_regex="(a*)*" * 3000)),
    "a machine of 2 ** 200 states": (CHAT, said(guided_regex="(a|b)*a(a|b){200}", max_tokens=60)),
    "a schema written out without end": (CHAT, schema(doubled(40))),
    "references in a row": (CHAT, schema({"$ref": "#/$defs/a0", "$defs": CHAINED})),
    "a pattern in a schema": (CHAT, schema({"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"})),
    "long lists": (CHAT, schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**8})),
    "many values": (CHAT, schema({"enum": [f"v{index}" for index in range(20_000)]})),
    "many choices": (CHAT, said(guided_choice=MANY)),
    "a long choice": (CHAT, said(guided_choice=["a" * 100_000])),
    "rules that are themselves": (CHAT, said(guided_grammar='start: start start | "a" | ""')),
    "arguments that are no number": (CHAT, called('{"a":NaN}')),
    "half a pair in arguments": (CHAT, called('{"a":"\\ud800"}')),
    "two thousand pictures in one": (CHAT, data(picture("GIF"))),
    "another type than it has": (CHAT, data(picture("BMP"), "text/html")),
    "a mark of images in text": (CHAT, said("<image>" * 10)),
}  # fmt: skip
"""Bodies that are answered, in bounded time."""

PRIVATE = [
    "http://127.0.0.1/", "http://0x7f000001/", "http://2130706433/", "http://127.1/", "http://0177.0.0.1/",
    "http://[::ffff:127.0.0.1]/", "http://[::1]/", "http://[::]/", "http://0.0.0.0/", "http://localhost./",
    "http://169.254.169.254/latest", "http://[fe80::1%25lo]/", "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/", "http://100.64.0.1/", "http://10.0.0.1/", "http://user@127.0.0.1/",
    "http://a\\b@127.0.0.1/", "http://127.0.0.1:99999/", "http:///etc", "http://①②⑦.0.0.1/", "http://[",
    "https://127.0.0.1/", "ftp://127.0.0.1/", "gopher://127.0.0.1/", "javascript:alert(1)", "/etc/passwd", "",
    "file:///etc/passwd", "file://localhost/etc/passwd", "file:///proc/self/mem", "file:FOLDER/link.png",
    "file://FOLDER/link.png", "file://FOLDER/../secret.png", "file://FOLDER/%2e%2e/secret.png",
    "file://FOLDER/a%00.png", "file://FOLDER/", "data:", "data:,", "data:;base64,", "data:image/png;base64",
    "data:image/png;base64,A", "data:image/png,%89PNG", "data:image/png;base64,\n\nAAAA",
]  # fmt: skip


def sent(running: Running, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    told = httpx.post(f"{running.url}{path}", content=content, headers=headers, timeout=SECONDS)
    assert httpx.get(f"{running.url}/health", timeout=SECONDS).json()["status"] == "ok"
    return told


@pytest.mark.parametrize("name", BODIES)
def test_it_is_refused_by_its_field(running: Running, name: str) -> None:
    path, body, param = BODIES[name]
    if param in ("guided_regex", "guided_grammar", "grammar", "json_schema", "response_format"):
        pytest.importorskip("llguidance")
    told = sent(running, path, body)
    assert told.status_code in (400, 404)
    error = told.json()["error"]
    assert (error["param"], bool(error["message"])) == (param, True)


@pytest.mark.parametrize("name", ANSWERED)
def test_it_is_answered(running: Running, name: str) -> None:
    pytest.importorskip("llguidance")
    told = sent(running, *ANSWERED[name])
    assert told.status_code == 200, told.text


@pytest.mark.parametrize("url", PRIVATE)
def test_no_url_leads_into_the_machine(running: Running, url: str) -> None:
    folder = running.service.settings.media.folder
    told = sent(running, CHAT, shown(url.replace("FOLDER", str(folder))))
    assert (told.status_code, told.json()["error"]["param"]) == (400, "messages")
    assert "secret" not in told.text


HEADS = {
    "no UTF-8 in a key": (b"Authorization: Bearer \xff\xfe", (200,)),
    "control letters in an id": (b"X-Request-Id: \xff\xfe\x01", (400,)),
    "a long id": (b"X-Request-Id: " + b"a" * 20_000, (200,)),
    "a trace of rubbish": (b"traceparent: \xff00-zz", (200,)),
    "another charset": (b"Content-Type: application/json; charset=\xff", (415,)),
    "an unknown framing": (b"Transfer-Encoding: \xff", (400,)),
    "two lengths": (b"Content-Length: 3", (400,)),
    "a length below zero": (b"Content-Length: -1", (400,)),
    "a length beyond all": (b"Content-Length: 99999999999999999999999", (400,)),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(running: Running, name: str) -> None:
    header, expected = HEADS[name]
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    kind = b"" if header.startswith(b"Content-Type") else b"Content-Type: application/json\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + kind + header
    told = exchange(
        (running.host, running.port),
        head + b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
        seconds=SECONDS,
    )
    assert int(told.split(b" ")[1]) in expected


def test_a_body_in_pieces_without_end_is_not_kept(running: Running) -> None:
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = post(TEXT, b"", "Transfer-Encoding: chunked", "Connection: close", framing=False)
    told = exchange((running.host, running.port), head, *[piece] * 200, b"0\r\n\r\n", seconds=SECONDS)
    assert told.startswith(b"HTTP/1.1 413 ")
