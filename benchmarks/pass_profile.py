"""A forward pass on the CPU by its parts: head, matrices of the layers, attention, other stages, Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.cpu.stage_program import StageProgram, stage_function
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError

__all__ = ["PARTS", "measure_pass"]

PARTS = ("head", "matrices", "attention", "other stages", "python")
"""Parts of a pass; Python with torch's own operations."""

_OTHER = ("add_and_norm", "gate", "head_positions", "layout")


def measure_pass(
    model: Any, *, sizes: Sequence[int] = (1, 4, 8, 16), context: int = 256, rounds: int = 9
) -> dict[int, dict[str, float]]:
    """Times passes over n nodes and their parts; medians, in milliseconds.

    The layers' programs and the head are timed, and Python is the rest. Of the programs, a stage's time is
    how much longer they take when it is done twice, which changes no result but that of rotated positions;
    matrices, which would then come from a cache, are what is left, with the threads' meetings.

    Args:
        model: Of an architecture whose layers run as a whole.
        sizes: Numbers of nodes.
        context: Tokens in the cache.
        rounds: Number of timings, in which all cases take turns.

    Returns:
        By n: "pass" and each of `PARTS`.

    Raises:
        InvalidInputError: The model's layers do not run as a whole.
    """
    kernels = CpuKernels(model)
    kernels.prepare()
    target = Target(model)
    target.threads = None  # all of torch's
    forward = tree_passes(target, context)
    kinds: dict[str, set[int]] = {
        "": set(),
        "attention": {stage_function("attend")},
        "other stages": {stage_function(name) for name in _OTHER},
    }
    head = model.get_output_embeddings()
    found: dict[tuple[int, str], list[float]] = {}
    with (
        torch.no_grad(),
        kernels.applied(),
        progress("Timing parts of passes", (rounds + 1) * len(sizes)) as advance,
    ):
        for turn in range(rounds + 1):
            for size in sizes:
                hidden = torch.randn(1, size, head.weight.shape[1]).to(head.weight.dtype)
                seconds = {"head": _seconds(partial(head, hidden))}
                for kind, functions in kinds.items():
                    with _programs(functions) as times:
                        whole = _seconds(partial(forward, size))
                    if not times:
                        raise InvalidInputError(
                            f"No layer of {type(model).__name__} runs as a whole over {size} tokens here.",
                            "Take a model of the usual structure, such as gemma3-270m or smollm2-135m.",
                        )
                    seconds[f"{kind} programs"] = sum(times)
                    if not kind:
                        seconds["pass"] = whole
                if turn:  # The first round lays programs out.
                    for name, value in seconds.items():
                        found.setdefault((size, name), []).append(value)
                advance()
    medians = {key: 1000 * float(np.median(seconds)) for key, seconds in found.items()}
    return {size: _parts({name: medians[size, name] for name in seconds}) for size in sizes}


def _parts(medians: dict[str, float]) -> dict[str, float]:
    whole, head, programs = medians["pass"], medians["head"], medians[" programs"]
    attention, others = (medians[f"{kind} programs"] - programs for kind in ("attention", "other stages"))
    return {
        "pass": whole,
        "head": head,
        "matrices": programs - attention - others,
        "attention": attention,
        "other stages": others,
        "python": whole - head - programs,
    }


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def _programs(repeated: set[int]) -> Iterator[list[float]]:
    """Seconds of each program that runs, which does the stages of some functions twice."""
    run, times = StageProgram.run, list[float]()
    known: dict[StageProgram, StageProgram] = {}

    def timed(self: StageProgram, addresses: Sequence[int], threads: int) -> None:
        if repeated and self not in known:
            known[self] = self.twice(repeated)
        times.append(_seconds(lambda: run(known.get(self, self), addresses, threads)))

    with patch.object(StageProgram, "run", timed):
        yield times
