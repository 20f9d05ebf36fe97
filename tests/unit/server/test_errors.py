"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.server.errors import ApiError, from_library


def test_errors_can_be_sent_whatever_they_quote() -> None:
    assert ApiError(400, "half \ud800").body()["error"]["message"] == "half ?"
    assert ApiError(418, "teapot").body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ApiError(429, "full"), 429, "full"),
        (InvalidInputError("n is 0.", "Take 1."), 400, "n is 0."),
        (DatastoreError("gone"), 500, "gone"),
        (ValueError("secret"), 500, "The server failed while it worked on this request; its log says why."),
    ],
)
def test_a_client_is_told_what_was_raised_on_purpose(error: Exception, status: int, message: str) -> None:
    made = from_library(error)
    assert (made.status, made.message) == (status, message)
