"""JSON that is encoded by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

__all__ = ["Json"]


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
