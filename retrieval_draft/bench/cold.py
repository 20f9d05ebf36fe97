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


_LAYERS = """
import json, time
import torch
from retrieval_draft.engine.linear_kernels import KERNELS, OURS
begin = time.perf_counter()
for dtype in (torch.float32, torch.bfloat16):
    for name in OURS:
        KERNELS[name](torch.ones(64, 64, dtype=dtype), None)(torch.ones(1, 64, dtype=dtype))
print(json.dumps(time.perf_counter() - begin))
"""


def measure_cold(rounds: int = 3) -> dict[str, Any]:
    """Imports in fresh processes, and compiles the kernels into an empty cache, then again from that cache.

    Args:
        rounds: Fresh imports; the least counts.

    Returns:
        import_seconds (torch_and_transformers, and retrieval_draft beyond them), compile_seconds and, for the
        linear layers on the CPU, layer_seconds (first, and cached).
    """
    imports = [_run(_IMPORT, {}) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"NUMBA_CACHE_DIR": cache}
        found = [[_run(program, environment) for _ in range(2)] for program in (_COMPILE, _LAYERS)]
    return {
        "import_seconds": {name: min(each[name] for each in imports) for name in imports[0]},
        **{
            name: dict(zip(("first", "cached"), seconds, strict=True))
            for name, seconds in zip(("compile_seconds", "layer_seconds"), found, strict=True)
        },
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
