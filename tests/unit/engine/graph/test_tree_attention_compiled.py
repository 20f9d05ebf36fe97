"""The Triton kernels, compiled for cards that need not be there: registers are enough for all they hold."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from retrieval_draft.engine.graph.tree_attention import (
    OPTIONS,
    _add_runs,
    _attend_run,
    block_sizes,
)

MOST_SPILLED = 64
"""Bytes of registers that a thread may keep in memory."""

POINTERS = {
    "Q": "*bf16", "K": "*bf16", "V": "*bf16", "OUT": "*bf16", "SINKS": "*bf16", "LENGTH": "*i64",
    "DEPTHS": "*i64", "HIDDEN": "*i1", "SUMS": "*fp32", "MAXIMA": "*fp32", "TOTALS": "*fp32",
    "scale": "fp32", "softcap": "fp32",
}  # fmt: skip


def spilled(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], processor: int, folder: Path
) -> int:
    """Bytes that a thread keeps in memory for want of registers, by ptxas."""
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names
    }
    # Strides and addresses that 16 divides, as those of an arena are; `triton.jit` finds that out by itself.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name][0] in "*i" and name != "window"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", processor, 32), options=options)
    program = folder / "kernel.ptx"
    program.write_text(compiled.asm["ptx"])
    architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert architecture is not None
    command = [
        get_ptxas(processor).path,
        "-v",
        f"--gpu-name={architecture[1]}",
        program,
        "-o",
        folder / "kernel.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert len(found) == 2, done.stderr
    return max(map(int, found))


@pytest.mark.parametrize("processor", [80, 90])
@pytest.mark.parametrize(
    ("dim", "group", "nodes", "extras"),
    [
        (128, 4, 64, ()),
        (128, 4, 64, ("WINDOWED",)),
        (64, 3, 1, ("CAPPED",)),
        (256, 4, 64, ("WINDOWED", "CAPPED")),
    ],
)
def test_hardly_any_register_is_kept_in_memory(
    dim: int, group: int, nodes: int, extras: tuple[str, ...], processor: int, tmp_path: Path
) -> None:
    rows, keys, wide, wide_value = block_sizes(group * nodes, dim, dim)
    sizes = {"VALUE": dim, "WIDE_VALUE": wide_value, "KEYS": keys}
    flags = {name: name in extras for name in ("WINDOWED", "CAPPED")} | {"MASKED": nodes > 1}
    rest = {"GROUP": group, "DIM": dim, "WIDE": wide, "ROWS": rows}
    assert spilled(_attend_run, sizes | rest | flags, OPTIONS, processor, tmp_path) <= MOST_SPILLED
    flags = {"WINDOWED": "WINDOWED" in extras, "HAS_SINKS": True}
    assert spilled(_add_runs, sizes | flags, {}, processor, tmp_path) <= MOST_SPILLED
