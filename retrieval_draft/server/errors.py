"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.http.json_response import error_body

__all__ = ["ApiError", "from_library"]


class ApiError(Exception):
    """An error in the response to a client.

    Args:
        status: Of HTTP; also the `code` in the body.
        message: For the client: the found and the allowed value.
        param: The field it is about.
        retry_after: Seconds, where trying again may help.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        message = message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return error_body(self.status, self.message, self.param)

    def headers(self) -> dict[str, str]:
        """Headers of the error response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def from_library(error: Exception) -> ApiError:
    """Error response for an exception, with its message only if it is one of this library's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RetrievalDraftError) and isinstance(error, ValueError):
        return ApiError(400, error.message)
    if isinstance(error, RetrievalDraftError):
        return ApiError(500, error.message)
    return ApiError(500, "The server failed while it worked on this request; its log says why.")
