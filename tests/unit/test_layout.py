"""The layout: links at the top level, and halves that do without torch."""

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
