"""The layout: links at the top level, halves that do without torch, and tests that mirror the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source distribution, which holds no links")
@pytest.mark.parametrize("half", ["index", "engine"])
def test_both_halves_stand_at_the_top_level_too(half: str) -> None:
    link = ROOT / half
    assert link.is_symlink()
    assert link.readlink() == Path("retrieval_draft", half), "relative, so that any checkout has it"
    assert (link / "__init__.py").is_file()


WITHOUT_TORCH = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is imported without need")

sys.meta_path.insert(0, Blocked())
import retrieval_draft
for package in ("_kernels", "index", "drafting", "draft_service", "integrations.llama_cpp"):
    home = importlib.import_module(f"retrieval_draft.{package}")
    for module in pkgutil.walk_packages(home.__path__, f"{home.__name__}."):
        if not module.name.endswith("shards"):  # needs Ray
            importlib.import_module(module.name)
for module in ("retrieval_proposer", "row_drafter", "request_tracker", "step_costs"):
    importlib.import_module(f"retrieval_draft.integrations.vllm.{module}")

from retrieval_draft import DraftConfig, Proposer
from retrieval_draft.index.draft_stores import DraftStores
proposer = Proposer(DraftStores(vocabulary=16), DraftConfig())
session = proposer.open([5, 6, 7, 8, 5, 6])
print(session.propose(4).tokens[1:3].tolist())
proposer.close()
"""


def test_drafting_does_without_torch() -> None:
    """Engines that keep their own model, and the drafting service, must not wait seconds for torch."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[7, 8]\n"


def test_the_package_has_few_rooms_and_no_circle() -> None:
    script = ROOT / "scripts" / "rooms.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("no circle")


TESTS = ROOT / "tests"
FOLDERS_OF_TESTS = ("benchmarks", "property", "system", "unit")

OF_NO_ONE_MODULE = {
    "engine/graph/test_tree_attention_compiled.py": "tree_attention.py, where it is not interpreted",
    "engine/sampling/test_distribution.py": "samples follow the model's distribution",
    "engine/test_fake_cuda.py": "the loop as on a device without one",
    "engine/test_launches.py": "launches and copies of a step",
    "index/build/test_bad_records.py": "documents beside records that cannot be read",
    "index/segments/test_manifests.py": "files of all indexes that say what cannot be",
    "index/store/test_snapshots_remote.py": "snapshots at a location that they are copied from",
    "methods/test_references.py": "reference texts in every method",
    "test_call_shapes.py": "arguments as of model.generate",
    "test_contributing.py": "the draft source of CONTRIBUTING.md",
    "test_copies.py": "copies of drafters",
    "test_docs_examples.py": "blocks of the documentation",
    "test_docs_links.py": "links of the documentation",
    "test_layout.py": "this file",
    "test_public_api.py": "names that the package exports",
    "test_refusals.py": "what a drafter refuses",
    "test_security_page.py": "SECURITY.md",
    "test_torch_modes.py": "modes of torch around a call",
    "test_words.py": "words of docstrings and comments",
}
"""Unit tests that look at several modules at once, by their place in tests/unit."""


def imports_of(file: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_tests(names: set[str]) -> bool:
    folders = {name.split(".")[1] for name in names if name.startswith("tests.")}
    return bool(folders & set(FOLDERS_OF_TESTS)) or any("test_" in name for name in names if "tests" in name)


def test_no_test_imports_another() -> None:
    files = [*TESTS.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 200
    assert [str(file.relative_to(ROOT)) for file in files if imports_tests(imports_of(file))] == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("from tests.unit.engine.test_attention import tree_of", True),
        ("def f():\n    import tests.system.test_distribution", True),
        ("from tests import property", True),
        ("from tests.support.trees import tree_of", False),
        ("from tests.random_generate.case import Case", False),
    ],
)
def test_imports_of_tests_are_found(text: str, is_found: bool, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(text)
    assert imports_tests(imports_of(tmp_path / "file.py")) == is_found


def mirrored(file: Path) -> bool:
    """True if a unit test stands where its module or package does: X/test_Y.py for X/Y.py, X/_Y.py or X/Y."""
    folder, name = ROOT / "retrieval_draft" / file.parent, file.stem.removeprefix("test_")
    modules = (folder / f"{name}.py", folder / f"_{name}.py", folder / name / "__init__.py")
    return any(module.is_file() for module in modules) or (folder.name == name and folder.is_dir())


def test_unit_tests_mirror_the_package() -> None:
    files = {file.relative_to(TESTS / "unit") for file in (TESTS / "unit").rglob("test_*.py")}
    assert len(files) > 100
    astray = {str(file) for file in files if not mirrored(file)}
    assert astray == set(OF_NO_ONE_MODULE), "move them, or say here why they have no module"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_no_file_of_the_package_is_ignored_by_git() -> None:
    """The wheel leaves out files that git ignores."""
    words = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.check_output(words, text=True, cwd=ROOT) == ""
