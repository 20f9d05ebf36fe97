"""Descriptions that routes share in the schema of the API."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = ["ERRORS", "GENERATED", "ErrorBody", "body_schema"]


class _ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: _ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
"""Error responses of an endpoint that reads a body."""

GENERATED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
}
"""Responses of an endpoint that generates text."""


def body_schema(name: str) -> dict[str, Any]:
    """Names the schema of a body in the description of the API."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
