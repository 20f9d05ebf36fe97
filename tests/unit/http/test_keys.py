"""API keys and addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.http.keys import KEYS_VARIABLE, KeyRing, is_loopback, read_keys


def test_the_tenant_of_a_key_and_of_no_other() -> None:
    ring = KeyRing({"key-number-one": "anna", "key-number-two": "bert"})
    assert ring.tenant("Bearer key-number-one") == "anna"
    assert ring.tenant("bearer key-number-two") == "bert"
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer key-number-on",
        "Basic key-number-one",
        "key-number-one",
    ):
        assert ring.tenant(wrong) is None
    assert ring.tenants == ["default", "anna", "bert"]


def test_without_keys_all_are_the_default_tenant() -> None:
    assert KeyRing({}, "us").tenant(None) == "us"
    assert KeyRing({}, "us").tenant("Bearer whatever") == "us"


def test_keys_come_from_options_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\nfile-key-1=anna\n\nfile-key-2\n")
    keys = read_keys(["option-key"], file, "us", {KEYS_VARIABLE: "env-key-1=bert, env-key-2"})
    assert keys == {
        "option-key": "us", "env-key-1": "bert", "env-key-2": "us", "file-key-1": "anna", "file-key-2": "us",
    }  # fmt: skip


@pytest.mark.parametrize(
    "word", ["short", "=anna", "long-enough=a b", "long-enough=..", "long-enough=" + "x" * 65]
)
def test_bad_keys_are_refused_and_not_shown(word: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        read_keys([word], None, "default", {})
    assert "long-enough" not in str(error.value)


def test_one_key_has_one_tenant(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        read_keys(["long-enough=anna", "long-enough=bert"], None, "default", {})
    with pytest.raises(InvalidInputError):
        read_keys([], tmp_path / "nowhere", "default", {})


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
