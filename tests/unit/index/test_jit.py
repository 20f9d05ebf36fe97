from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retrieval_draft

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
automaton = SuffixAutomaton()
automaton.insert(np.array([1, 2, 3, 1, 2, 3, 1], np.int32))
print(automaton.propose(3, automaton.workspace()).tokens.tolist())
"""


@pytest.mark.skipif(bool(os.environ.get("NUMBA_DISABLE_JIT")), reason="nothing is compiled")
def test_kept_machine_code_is_not_used_when_another_kernel_changed(tmp_path: Path) -> None:
    """A changed helper, same size, same time: what an upgrade from a reproducible wheel looks like."""
    package = tmp_path / "retrieval_draft"
    home = Path(retrieval_draft.__file__).parent
    shutil.copytree(home, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run() -> str:
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        return done.stdout

    before = run()
    assert before == "[2, 3, 1]\n"
    heap = package / "index" / "_kernels" / "heap.py"
    stat = heap.stat()
    text = heap.read_text(encoding="utf-8")
    changed = text.replace("if bucket < cut[CUT]:", "if bucket > cut[CUT]:")
    assert changed != text
    heap.write_text(changed, encoding="utf-8")
    os.utime(heap, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run() != before
