"""t(n), the cost of a forward pass over n tokens: with stock kernels, with ours, at the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError

__all__ = ["SIZES", "measure_forward"]

SIZES = (1, 2, 4, 8, 16, 32, 64)
_READ_BYTES = 512 << 20
_GEMM = 1536


def measure_forward(models: Sequence[Any], *, context: int = 256, rounds: int = 7) -> list[dict[str, Any]]:
    """Times verification passes over n = 1, 2, 4, ..., 64 nodes, stock and ours in turn; medians.

    The machine is measured in the same rounds: the rate at which it reads a large buffer and the rate of a
    large float32 product, both with torch's threads. The limit of a pass is the larger of weight bytes over
    the first and 2 n parameters over the second; weights are those of matrices, an embedding table only
    where it is the head too.

    Args:
        models: Measured in turn in each round, for instance one model in two dtypes.
        context: Tokens in the cache.
        rounds: Number of timings of each case.

    Returns:
        One object for each model, as ``bench forward --json`` prints it.
    """
    if rounds < 1 or context < 1:
        raise InvalidInputError(f"rounds is {rounds}, context is {context}; both must be at least 1.")
    kernels = [CpuKernels(model) for model in models]
    for each in kernels:
        each.prepare()
    with torch.no_grad():
        passes = [
            {"stock": _passes(model, context, choose=False), "ours": _passes(model, context, choose=True)}
            for model in models
        ]
        times: dict[tuple[int, str, int], list[float]] = {}
        machine = _Machine(models[0].device)
        with progress("Measuring forward passes", rounds * len(SIZES) * len(models)) as advance:
            for turn in range(rounds + 1):
                machine.measure()
                for size in SIZES:
                    for number, forward in enumerate(passes):
                        for name in ("stock", "ours"):
                            with kernels[number].applied() if name == "ours" else nullcontext():
                                begin = time.perf_counter()
                                forward[name](size)
                                seconds = time.perf_counter() - begin
                            if turn:  # The first round warms caches up.
                                times.setdefault((number, name, size), []).append(seconds)
                        advance()
    return [
        _result(model, machine, context, kernels[number], {
            (name, size): float(np.median(times[number, name, size])) for name in ("stock", "ours") for size
            in SIZES
        })
        for number, model in enumerate(models)
    ]  # fmt: skip


def _passes(model: Any, context: int, choose: bool) -> Callable[[int], object]:
    """Passes over so many nodes; with `choose` on as many threads as are fastest, else on all."""
    target = Target(model)
    if not choose:
        target.threads = None
    forward = tree_passes(target, context)

    def run(nodes: int) -> None:
        logits = forward(nodes)
        if target.device.type == "cuda":
            torch.cuda.synchronize(logits.device)

    return run


class _Machine:
    """Read bandwidth and arithmetic of a device, measured in every round."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.ones(_READ_BYTES // 4, device=device)
        self._square = torch.ones(_GEMM, _GEMM, device=device)
        self._read: list[float] = []
        self._multiply: list[float] = []

    def measure(self) -> None:
        self._read.append(_READ_BYTES / _seconds(lambda: self._buffer.sum()))
        self._multiply.append(2 * _GEMM**3 / _seconds(lambda: torch.mm(self._square, self._square)))

    @property
    def bandwidth(self) -> float:
        return float(np.median(self._read[1:]))

    @property
    def flops(self) -> float:
        return float(np.median(self._multiply[1:]))


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    begin = time.perf_counter()
    out = work()
    if out.device.type == "cuda":
        torch.cuda.synchronize(out.device)
    return time.perf_counter() - begin


def _weights(model: Any) -> tuple[int, int]:
    """Bytes and numbers in the matrices that a pass reads whole."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    matrices = {
        id(weight): weight
        for weight in model.parameters()
        if weight.dim() >= 2 and (tied or weight is not embedding)
    }.values()
    return sum(weight.nbytes for weight in matrices), sum(weight.numel() for weight in matrices)


def _result(
    model: Any,
    machine: _Machine,
    context: int,
    kernels: CpuKernels,
    seconds: dict[tuple[str, int], float],
) -> dict[str, Any]:
    weight_bytes, parameters = _weights(model)

    def curve(name: str) -> dict[str, Any]:
        return {
            "milliseconds": {size: 1000 * seconds[name, size] for size in SIZES},
            "ratio": {size: seconds[name, size] / seconds[name, 1] for size in SIZES},
        }

    limit = {
        size: 1000 * max(weight_bytes / machine.bandwidth, 2 * size * parameters / machine.flops)
        for size in SIZES
    }
    return {
        **curve("ours"),
        "stock": curve("stock"),
        "limit": {"milliseconds": limit},
        "read_gb_per_second": machine.bandwidth / 1e9,
        "sgemm_gflop_per_second": machine.flops / 1e9,
        "weight_bytes": weight_bytes,
        "parameters": parameters,
        "context": context,
        "kernels": kernels.linear.choices() if kernels.is_active else {},
        "model": model.config.name_or_path or type(model).__name__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
