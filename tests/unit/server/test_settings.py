"""Limits of the server."""

from __future__ import annotations

from typing import Any

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.settings import ServerSettings


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_choices": 300},
        {"grace_seconds": -1.0},
        {"max_prompt_tokens": -5},
        {"cors_origins": ("example.org",)},
    ],
)
def test_limits_are_checked(options: Any) -> None:
    ServerSettings("m")
    with pytest.raises(InvalidInputError):
        ServerSettings("m", **options)
