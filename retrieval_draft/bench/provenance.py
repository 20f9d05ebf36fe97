"""Provenance of a measurement: code, versions, command and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance"]

_PACKAGES = ("retrieval_draft", "torch", "transformers", "numpy", "numba", "tokenizers")


def provenance() -> dict[str, Any]:
    """Data needed to repeat a measurement, as plain types for JSON."""
    import torch

    return {
        "git": _git_sha(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "argv": sys.argv[1:],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    """The commit of this checkout, with a + when files were changed; None for an installed package."""
    package = Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None
    try:
        sha = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{sha}+" if changed else sha


def _git(folder: Path, *arguments: str) -> str:
    # A copied checkout may belong to another user and have other modes: it is the same code.
    command = ["git", "-C", str(folder), "-c", "safe.directory=*", "-c", "core.fileMode=false", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
