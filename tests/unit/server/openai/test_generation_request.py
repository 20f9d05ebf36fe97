"""The table of fields in docs/server.md has every field of every body."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retrieval_draft.server.openai.chat_request import ChatRequest
from retrieval_draft.server.openai.completions_request import CompletionRequest
from retrieval_draft.server.openai.responses_request import ResponsesRequest

DOCS = Path(__file__).parents[4] / "docs" / "server.md"


@pytest.mark.parametrize("body", [CompletionRequest, ChatRequest, ResponsesRequest])
def test_every_field_is_in_the_table(body: type) -> None:
    table = DOCS.read_text("utf-8").split("\n## Fields\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)", table))
    assert set(body.__struct_fields__) - named == set()
