"""The Python on the pages of docs/ runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_tiny

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: str, **given: Any) -> dict[str, Any]:
    """Runs all blocks of a page, one after the other, and returns what they defined."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} holds no Python"
    defined = {"__name__": "__main__", **given}
    for block in blocks:
        # Line numbers in tracebacks are those of the page.
        code = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(code, str(DOCS / page), "exec"), defined)  # noqa: S102
    return defined


def test_transformers_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    folder = save_tiny(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    defined = run("transformers.md", name=str(folder))
    assert defined["drafter"].stats.requests >= 8
    assert (tmp_path / "my-drafter" / "drafter.json").is_file()
    assert defined["again"].config == defined["drafter"].config


def test_llama_cpp_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    from tests.integrations.llama_cpp.tiny_gguf import write_tiny

    write_tiny(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    defined = run("llama_cpp.md")
    assert len(defined["reply"]["choices"][0]["text"]) > 10
    assert defined["drafts"].stats.requests == 1
    assert "Counter" in capsys.readouterr().out


def test_pages_name_files_that_exist() -> None:
    for page in ("transformers.md", "llama_cpp.md", "integrations.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text):
            assert (DOCS / target).is_file(), f"{page} points to {target}"
        for path in re.findall(r"`((?:tests|scripts)/[\w/.]+)`", text):
            assert (DOCS.parent / path).exists(), f"{page} names {path}"
