"""The benchmark of drafts across tokenizers, on small ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.commands.tokenizers import TEXTS
from tests.support.commands import Command
from tests.support.tokenizers_for_tests import byte_level, metaspace


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> str:
    folders = []
    for made in (byte_level(("ab", "abc", "de")), metaspace(("a", "ab", "abc"))):
        folders.append(tmp_path_factory.mktemp("tokenizer"))
        made.save_pretrained(folders[-1])
    return ",".join(map(str, folders))


def test_a_text_is_drafted_through_both(command: Command, names: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"letters": "h g f e c " * 9, "words": "abc de abc h " * 9}))
    code, shown, err = command(
        "benchmarks", "tokenizers", "--tokenizers", names, "--texts", str(texts), "--json"
    )
    assert code == 0, err
    for pair in json.loads(shown)["pairs"]:
        assert pair["beyond_ascii"] == 0
        assert pair["tokens_per_step"]["text"]["letters"] > 6
        assert pair["to_first"]["text"]["words"] > 0.9
        assert pair["to_first"]["intersection"]["words"] < 0.9
    code, shown, _ = command("benchmarks", "tokenizers", "--tokenizers", names, "--texts", str(texts))
    assert code == 0
    assert "tokens per step" in shown


@pytest.mark.parametrize(("content", "message"), [("[]", "holds no texts"), ("{", "Cannot read the texts")])
def test_bad_input_is_refused(
    command: Command, names: str, tmp_path: Path, content: str, message: str
) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(content)
    code, _, err = command("benchmarks", "tokenizers", "--tokenizers", names, "--texts", str(texts))
    assert (code, message in err) == (1, True)
    code, _, err = command("benchmarks", "tokenizers", "--tokenizers", names.split(",")[0])
    assert (code, "Name two or more" in err) == (1, True)


def test_the_texts_of_the_project_are_three_languages() -> None:
    found = json.loads(TEXTS.read_text(encoding="utf-8"))
    assert list(found) == ["English", "French", "Chinese"]
