"""Options: environment before file before default, and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.integrations.vllm import VllmOptions


def test_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"min_prob": 0.2, "index": ["/a", "/b"], "tenant": "team"}')
    options = VllmOptions.read({"RETRIEVAL_DRAFT_CONFIG": str(file), "RETRIEVAL_DRAFT_MIN_PROB": "0.3"})
    assert (options.min_prob, options.index, options.tenant) == (0.3, ("/a", "/b"), "team")
    assert options.share == "reply"
    assert options.costs == "learned"
    assert VllmOptions.read({}) == VllmOptions()
    assert VllmOptions.read({"RETRIEVAL_DRAFT_STORE": ""}).store is None


def test_lists_and_stores_from_the_environment() -> None:
    options = VllmOptions.read(
        {
            "RETRIEVAL_DRAFT_INDEX": os.pathsep.join(["/x", "/y"]),
            "RETRIEVAL_DRAFT_SOURCES": "automaton, history",
            "RETRIEVAL_DRAFT_STORE": "redis://localhost:1",
            "RETRIEVAL_DRAFT_SHARE": "all",
            "RETRIEVAL_DRAFT_HISTORY_FOLDER": "/h",
        }
    )
    assert options.index == ("/x", "/y")
    assert options.draft_config().sources == ("automaton", "history")
    assert options.draft_config().history_folder == "/h"
    store = options.store_config()
    assert store is not None
    assert (store.url, store.share) == ("redis://localhost:1", "all")
    assert options.needs_tokenizer
    assert not VllmOptions().needs_tokenizer


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read from Python 3.11 on")
def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('costs = "ignored"\nsources = ["automaton"]\n')
    options = VllmOptions.read({"RETRIEVAL_DRAFT_CONFIG": str(file)})
    assert (options.costs, options.sources) == ("ignored", ("automaton",))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RETRIEVAL_DRAFT_MIN_PROB": "much"}, "RETRIEVAL_DRAFT_MIN_PROB: Expected `float`"),
        ({"RETRIEVAL_DRAFT_MIN_PROB": "1.5"}, "RETRIEVAL_DRAFT_MIN_PROB: Expected `float` <= 1.0"),
        ({"RETRIEVAL_DRAFT_COSTS": "free"}, "RETRIEVAL_DRAFT_COSTS: Invalid enum value 'free'"),
        ({"RETRIEVAL_DRAFT_SHARE": "some"}, "RETRIEVAL_DRAFT_SHARE is 'some'"),
        ({"RETRIEVAL_DRAFT_SOURCES": "tea"}, "Unknown draft source 'tea'"),
        ({"RETRIEVAL_DRAFT_TENANT": "a/b", "RETRIEVAL_DRAFT_STORE": "redis://h"}, "tenant 'a/b'"),
        ({"RETRIEVAL_DRAFT_HISTORY_BYTES": "12"}, "HISTORY_BYTES: Expected `int` >="),
        ({"RETRIEVAL_DRAFT_CONFIG": "/nowhere.json"}, "cannot be read"),
    ],
)
def test_what_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        VllmOptions.read(environment)


def test_a_file_with_unknown_options_or_no_table(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    for text, message in (('{"minprob": 1}', "minprob"), ("[]", "holds a list"), ("{", "cannot be read")):
        file.write_text(text)
        with pytest.raises(InvalidInputError, match=message):
            VllmOptions.read({"RETRIEVAL_DRAFT_CONFIG": str(file)})
