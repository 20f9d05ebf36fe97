"""The origin of a measurement."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from retrieval_draft.bench import provenance as module


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one file, which provenance takes for its own."""
    file = tmp_path / "retrieval_draft" / "bench" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    monkeypatch.setattr(module, "__file__", str(file))
    return file


def test_commit_is_named_and_marked_only_where_tracked_files_differ(checkout: Path) -> None:
    sha = git(checkout.parent, "rev-parse", "HEAD")
    assert module.provenance()["git"] == sha
    (checkout.parent / "new").write_text("untracked")
    checkout.chmod(0o755)
    assert module.provenance()["git"] == sha
    checkout.write_text("2")
    assert module.provenance()["git"] == f"{sha}+"


def test_checkout_of_another_user_is_read(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = git(checkout.parent, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert module.provenance()["git"] == sha


def test_installed_package_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "retrieval_draft" / "bench" / "provenance.py"))
    assert module.provenance()["git"] is None
