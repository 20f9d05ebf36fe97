"""Decoding of JSON request bodies, which stops at the first error."""

from __future__ import annotations

import re
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import Raw
from starlette.requests import ClientDisconnect, Request

from retrieval_draft.http.body_headers import unreadable
from retrieval_draft.server.errors import ApiError

__all__ = ["decode_body", "decode_field", "decode_texts", "is_absent", "read_body"]

Body = TypeVar("Body")
_PATH = re.compile(r" - at `(?:key in )?\$(.*?)`$", re.DOTALL)
_NAME = re.compile(r"^\.?([A-Za-z0-9_]+)")
_FIELD = re.compile(r"field `(.*?)`", re.DOTALL)
_KINDS = ("application/json",)
_MAX_SHOWN = 100


async def read_body(request: Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """The body of a request.

    One pass of msgspec leaves fields that are read later undecoded (`msgspec.Raw`) and ends at the first
    error, so that a wrong body costs no more than a right one.

    Raises:
        ApiError: It is no JSON, or no such body (400), or its headers declare another type (415).
    """
    error = unreadable(request.headers.raw, _KINDS)
    if error is not None:
        raise ApiError(415, error)
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ApiError(499, "The client has left.") from error
    return decode_body(body, decoder)


def decode_body(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decodes a body.

    Raises:
        ApiError: It is no JSON, or no such body.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as wrong:
        _refuse(str(wrong), "")
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise ApiError(400, f"The body is not valid JSON: {wrong}.") from wrong
    except RecursionError as wrong:
        raise ApiError(400, "The body is nested too deeply.") from wrong


def decode_field(raw: Raw, decoder: msgspec.json.Decoder[Body], name: str) -> Body:
    """Decodes a field that was left raw.

    Raises:
        ApiError: It has another type.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as wrong:
        _refuse(str(wrong), name)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise ApiError(400, f"{name} is not valid JSON: {wrong}.", name) from wrong
    except RecursionError as wrong:
        raise ApiError(400, f"{name} is nested too deeply.", name) from wrong


def decode_texts(raw: Raw, decoder: msgspec.json.Decoder[list[str]], name: str, most: int) -> list[str]:
    """Decodes a raw list of texts, or a single text as a list of one.

    Args:
        raw: The undecoded value.
        decoder: Of a list.
        name: Of the field.
        most: Texts at most.

    Raises:
        ApiError: It has another type, or is longer.
    """
    encoded = bytes(raw)
    if encoded.startswith(b'"'):
        return decode_field(Raw(b"[" + encoded + b"]"), decoder, name)
    # This separates two texts, and occurs at most once within one: a quote within text has a backslash.
    if encoded.count(b'","') > 2 * most:
        raise ApiError(400, f"{name} has more than {most} entries.", name)
    found = decode_field(raw, decoder, name)
    if len(found) > most:
        raise ApiError(400, f"{name} has {len(found)} entries; {most} are allowed.", name)
    return found


def is_absent(raw: Raw, *also: bytes) -> bool:
    """True if a field is absent, or has the meaning of its absence.

    Args:
        raw: The undecoded value.
        *also: Values besides null that change nothing, as JSON.
    """
    view = memoryview(raw)
    return len(view) < _MAX_SHOWN and bytes(view).strip() in (b"", b"null", *also)


def _refuse(message: str, name: str) -> NoReturn:
    """Raises msgspec's message, with the field in front."""
    found = _PATH.search(message)
    detail, path = (message[: found.start()], found[1]) if found else (message, "")
    field = _FIELD.search(detail)
    if field is not None and not path and not name:
        name = field[1]
        known = "unknown field" not in detail
        short = name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "..."
        text = f"{short}: required." if known else f"{short} is not known to this server; leave it out."
        raise ApiError(400, text, short)
    where = name + path if name else path.lstrip(".")
    first: Any = name or ((match := _NAME.match(path)) and match[1]) or None
    raise ApiError(400, f"{where}: {detail}." if where else f"The body: {detail}.", first)
