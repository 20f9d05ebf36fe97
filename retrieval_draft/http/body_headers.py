"""Headers that describe a body."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from email.message import Message

__all__ = ["media_type", "unreadable"]

_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")


def media_type(content_type: bytes) -> str:
    """The media type of a Content-Type header, without its parameters."""
    return content_type.partition(b";")[0].strip().lower().decode("latin-1")


def unreadable(headers: Iterable[tuple[bytes, bytes]], kinds: Collection[str]) -> str | None:
    """Returns the reason to refuse a body with such headers; None if it can be read.

    `kinds` has no type that a browser sends to another origin without a preflight request, or any page could
    use a server on the same machine.

    Args:
        headers: Of the request, names in lower case.
        kinds: Supported media types, the first of which is named in the reason; "" for a body without a type.
    """
    types = [value for name, value in headers if name == b"content-type"]
    encodings = [value for name, value in headers if name == b"content-encoding"]
    for encoding in encodings:
        if encoding.strip().lower() not in (b"", b"identity"):
            return (
                f"Content-Encoding is {encoding.decode('latin-1')!r}; send the body as it is, not compressed."
            )
    found = types[-1] if types else b""
    wanted = next(iter(kinds))
    if media_type(found) not in kinds:
        received = repr(found.decode("latin-1")) if types else "missing"
        return f"Content-Type is {received}; send {wanted}."
    message = Message()
    message["Content-Type"] = found.decode("latin-1")
    charset = str(message.get_param("charset", "utf-8"))
    if charset.lower() not in _UTF8:
        return f"Content-Type names the charset {charset!r}; send the body in UTF-8."
    return None
