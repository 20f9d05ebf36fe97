from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retrieval_draft
from retrieval_draft._kernels.jit import kernel_files

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
automaton = SuffixAutomaton()
automaton.insert(np.array([1, 2, 3, 1, 2, 3, 1], np.int32))
print(automaton.propose(3, automaton.workspace()).tokens.tolist())
"""


def test_the_stamp_covers_every_file_with_a_kernel() -> None:
    """A kernel that the stamp leaves out would run as old machine code after an upgrade."""
    home = Path(retrieval_draft.__file__).parent
    compiled = {
        path
        for path in home.rglob("*.py")
        if any(
            mark in path.read_text(encoding="utf-8") for mark in ("@kernel", "@inner_kernel", "@sum_kernel")
        )
    }
    assert len(compiled) > 20
    assert compiled <= set(kernel_files())


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
    heap = package / "_kernels" / "heap.py"
    stat = heap.stat()
    text = heap.read_text(encoding="utf-8")
    changed = text.replace("if bucket < cut[CUT]:", "if bucket > cut[CUT]:")
    assert changed != text
    heap.write_text(changed, encoding="utf-8")
    os.utime(heap, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run() != before


@pytest.mark.skipif(bool(os.environ.get("NUMBA_DISABLE_JIT")), reason="nothing is compiled")
@pytest.mark.parametrize("trouble", ["no folder", "full disk", "torn"])
def test_kernels_run_where_machine_code_cannot_be_kept(tmp_path: Path, trouble: str) -> None:
    """Containers with another user, read-only roots, full disks, files that a crash left half written."""
    package = tmp_path / "retrieval_draft"
    home = Path(retrieval_draft.__file__).parent
    shutil.copytree(home, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    program = PROGRAM
    if trouble == "no folder":
        (tmp_path / "file").write_text("")
        for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
            (folder / "__pycache__").write_text("")  # nobody can write below a file
        nowhere = str(tmp_path / "file")
        environment |= {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "PYTHONDONTWRITEBYTECODE": "1"}
    elif trouble == "full disk":
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "kept")
        program = (
            """
from numba.core.caching import IndexDataCacheFile
def full(self, *given):
    raise OSError(28, "No space left on device")
IndexDataCacheFile._save_data = full
"""
            + PROGRAM
        )
    else:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "kept")

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
        )  # fmt: skip
        return done.stdout + done.stderr

    assert run() == "[2, 3, 1]\n"
    if trouble == "torn":
        files = list((tmp_path / "kept").rglob("*.nb[ic]"))
        assert files
        for number, file in enumerate(files):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if number % 2 else b"")
        assert run() == "[2, 3, 1]\n"
        assert run() == "[2, 3, 1]\n"
