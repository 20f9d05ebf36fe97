"""What a fresh install waits for: the import, and the first compilation of the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

__all__ = ["measure_cold"]

_IMPORT = """
import json, sys, time
begin = time.perf_counter()
import torch, transformers
import transformers.cache_utils, transformers.generation.utils, transformers.modeling_utils
models = time.perf_counter()
import retrieval_draft
retrieval_draft.RetrievalDrafter
print(json.dumps({"torch_and_transformers": models - begin, "retrieval_draft": time.perf_counter() - models}))
"""

_COMPILE = """
import json, time
from retrieval_draft.config import DraftConfig
from retrieval_draft.engine.warm_up import compile_kernels
begin = time.perf_counter()
compile_kernels(DraftConfig())
print(json.dumps(time.perf_counter() - begin))
"""


def measure_cold(rounds: int = 3) -> dict[str, Any]:
    """Imports in fresh processes, and compiles the kernels into an empty cache, then again from that cache.

    Args:
        rounds: Fresh imports; the least counts.

    Returns:
        import_seconds (torch_and_transformers, and retrieval_draft beyond them), compile_seconds (first, and
        cached).
    """
    imports = [_run(_IMPORT, {}) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"NUMBA_CACHE_DIR": cache}
        first, cached = _run(_COMPILE, environment), _run(_COMPILE, environment)
    return {
        "import_seconds": {name: min(found[name] for found in imports) for name in imports[0]},
        "compile_seconds": {"first": first, "cached": cached},
    }


def _run(program: str, environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])
