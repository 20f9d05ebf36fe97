"""Links, anchors and the site's table of contents, without building the site."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

import retrieval_draft
from retrieval_draft.cli import app
from tests.support.pages import PAGES, ROOT, lines_of, prose_of

ALL = [*PAGES, "deploy/README.md"]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """scripts/docs_hooks.py, which mkdocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts/docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: str) -> set[str]:
    """Those that GitHub gives to headings, as the site does."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose_of(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        assert anchor not in found, f"{page} has two headings {heading!r}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"`[^`]*`", "", prose_of(page).replace("``", ""))
    for target, anchor in LINK.findall(text):
        if re.match(r"\w+:", target):
            assert target.startswith("https://"), f"{page}: {target}"
            continue
        path = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} points to {target}"
        assert path.is_relative_to(ROOT), f"{page} points out of the repository: {target}"
        if anchor:
            name = path.relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page} points to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    for path in re.findall(
        r"`((?:tests|scripts|benchmarks|deploy|examples|docs)/[\w/.]+\w)[`:]", prose_of(page)
    ):
        assert (ROOT / path).exists(), f"{page} names {path}"
    for path in re.findall(r"`(retrieval_draft/[\w/.]+\.py)`", prose_of(page)):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_readme_is_short_and_each_figure_has_its_command() -> None:
    assert len(lines_of("README.md")) <= 150
    table = prose_of("README.md").partition("| what | figure | command |")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == 6
    assert all(re.search(r"`(retrieval-draft bench|python -m benchmarks) ", row) for row in rows)


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", prose_of("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == retrieval_draft.__version__


def test_all_pages_are_in_the_table_of_contents(hooks: ModuleType) -> None:
    named = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    named += re.findall(r"^  - [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    made = {"examples.md", *hooks.OUTSIDE.values()}
    there = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert set(named) == there | made


def test_the_reference_holds_every_public_name() -> None:
    page = (ROOT / "docs/reference/python.md").read_text("utf-8")
    named = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    public = {f"retrieval_draft.{name}" for name in retrieval_draft.__all__ if name != "__version__"}
    assert public <= set(named)
    for path in named:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    for block in re.findall(r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", page, re.MULTILINE):
        module, _, name = block[0].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert all(hasattr(kind, member) for member in block[1].split(", ")), block


def test_the_command_reference_is_made_of_the_commands(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown(hooks.COMMANDS, _Page("reference/command_line.md"))
    command = typer.main.get_command(app)
    names = [
        f"{name} {below}"
        for name, each in command.commands.items()
        for below in getattr(each, "commands", {})
    ]
    for name in [*command.commands, *names]:
        assert f"## retrieval-draft {name}\n" in page
    assert "| `--max-new-tokens` | `256` | Tokens to generate at most. |" in page
    assert "| `--cpu-kernels, --stock-kernels` |" in page
    assert hooks.COMMANDS in (ROOT / "docs/reference/command_line.md").read_text("utf-8")


class _Page:
    """A page as mkdocs hands it to a hook."""

    def __init__(self, name: str) -> None:
        self.file = self
        self.src_uri = name
        self.generated_by = None


@pytest.mark.parametrize(
    ("source", "link", "found"),
    [
        ("docs/store.md", "](server.md#limits)", "](server.md#limits)"),
        ("docs/store.md", "](../CONTRIBUTING.md#rules)", "](contributing.md#rules)"),
        ("docs/store.md", "](../examples/plain.py)", "](examples.md)"),
        ("docs/reference/python.md", "](../generation.md)", "](../generation.md)"),
        ("docs/reference/python.md", "](../../README.md)", "](../index.md)"),
        ("deploy/README.md", "](../docs/store.md)", "](store.md)"),
        ("CONTRIBUTING.md", "](docs/gpu.md)", "](gpu.md)"),
        ("CONTRIBUTING.md", "](#set-up)", "](#set-up)"),
        (
            "docs/vllm.md",
            "](https://github.com/vllm-project/vllm)",
            "](https://github.com/vllm-project/vllm)",
        ),
    ],
)
def test_links_are_right_in_the_site_too(hooks: ModuleType, source: str, link: str, found: str) -> None:
    assert hooks.relinked(link, source) == found


def test_each_example_is_on_the_site(hooks: ModuleType) -> None:
    page = hooks.examples()
    programs = sorted((ROOT / "examples").glob("*.py"))
    assert len(programs) >= 6
    for path in programs:
        assert f"## {path.name}\n" in page
        most = 250 if "head" in path.name else 60  # training is no program of one page
        assert 20 <= len(path.read_text("utf-8").splitlines()) <= most, "short enough to copy"
        assert path.read_text("utf-8") in page
        assert Path(path).name in (ROOT / "tests/system/test_examples.py").read_text("utf-8")
