"""JSON that is encoded by msgspec, and errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

__all__ = ["Json", "error_body", "error_type"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    409: "conflict_error",
    413: "request_too_large_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Json(Response):
    """A response with a JSON body.

    Args:
        value: Plain types.
        status: Of HTTP.
        headers: Further ones.
    """

    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(value), status, headers)


def error_type(status: int) -> str:
    """The ``type`` of an error with an HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": status}}
