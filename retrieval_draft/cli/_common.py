"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DIFFERENT", "CpuKernels", "Device", "Dtype", "Index", "Json", "Model", "Nodes"]

DIFFERENT = 3
"""Exit code: verification found a difference."""

Model = Annotated[
    str, typer.Option("--model", help="A folder, a hub name, or gemma3-270m.", show_default=False)
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ... or auto. CUDA where there is one, by default.")
]
Nodes = Annotated[
    int | None,
    typer.Option("--nodes", min=0, help="Draft nodes of every step. By default the measured cost decides."),
]
CpuKernels = Annotated[
    bool,
    typer.Option(
        "--cpu-kernels/--stock-kernels", help="Faster layers for few tokens on the CPU while drafting."
    ),
]
Index = Annotated[
    list[Path] | None,
    typer.Option("--index", help="A corpus index to draft from; repeatable.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
