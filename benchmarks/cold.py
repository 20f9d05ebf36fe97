"""Waiting times of a fresh install: the import, the first compilation, and measuring kernels for a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from retrieval_draft._files import cache_home

__all__ = ["measure_cold", "measure_first_use"]

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
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.drafting.sources import DraftStores, make_sources
from retrieval_draft.engine.warm_up import compile_kernels
config = DraftConfig()
begin = time.perf_counter()
compile_kernels(make_sources(config, DraftStores(4096)), fuse, config.top_k)
print(json.dumps(time.perf_counter() - begin))
"""


_LAYERS = """
import json, time
import torch
from retrieval_draft.engine.cpu.linear_kernels import KERNELS, OURS
begin = time.perf_counter()
for dtype in (torch.float32, torch.bfloat16):
    for name in OURS:
        KERNELS[name](torch.ones(64, 64, dtype=dtype), None)(torch.ones(1, 64, dtype=dtype))
print(json.dumps(time.perf_counter() - begin))
"""

_FIRST_USE = """
import json, sys, time
import torch
from retrieval_draft.bench.datastores import resident_bytes
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.target import Target
from retrieval_draft.models.loading import load_model

model, _ = load_model(sys.argv[1], dtype=sys.argv[2], device="cpu")
kernels = CpuKernels(model)
with torch.no_grad():
    forward = tree_passes(Target(model), 256)
    for size in (1, 8, 64):
        forward(size)
    stock = resident_bytes()
    begin = time.perf_counter()
    kernels.prepare()
    seconds = time.perf_counter() - begin
    with kernels.applied():
        for size in (1, 8, 64):
            forward(size)
weights = sum(weight.nbytes for weight in model.parameters())
print(json.dumps({"seconds": seconds, "stock": stock, "ours": resident_bytes(), "weights": weights}))
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


def measure_first_use(model: str, dtype: str) -> dict[str, Any]:
    """Prepares the CPU kernels for a model without any cache, then again in a new process.

    Args:
        model: As for `load_model`.
        dtype: Of its weights.

    Returns:
        first_seconds and again_seconds, of `CpuKernels.prepare` (compiling and measuring); weight_bytes;
        stock_bytes and kernel_bytes, resident in the second process after passes with the layers of torch and
        after passes with ours (None where the system does not report it).
    """
    from retrieval_draft.models.loading import load_model

    load_model(model, dtype=dtype, device="cpu")  # Downloads and conversions are not measured.
    home = cache_home()
    with tempfile.TemporaryDirectory() as cache:
        folder = Path(cache) / "home"
        folder.mkdir()
        (folder / "models").symlink_to(home / "models")
        environment = {"NUMBA_CACHE_DIR": cache, "RETRIEVAL_DRAFT_HOME": str(folder)}
        first, again = (_run(_FIRST_USE, environment, model, dtype) for _ in range(2))
    return {
        "first_seconds": first["seconds"],
        "again_seconds": again["seconds"],
        "weight_bytes": again["weights"],
        "stock_bytes": again["stock"],
        "kernel_bytes": again["ours"],
    }


def _run(program: str, environment: dict[str, str], *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])
