"""Programs of `run_stages`: laid out once, filled in with addresses for each run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from retrieval_draft.engine.threads import on_threads

__all__ = ["At", "StageProgram", "stage_function"]


@dataclass(frozen=True, slots=True)
class At:
    """An address that is known when a program runs.

    Attributes:
        base: Name of a base address.
        offset: Bytes from there.
    """

    base: str
    offset: int = 0


class StageProgram:
    """Jobs that threads do stage by stage, in one parallel section.

    Args:
        bases: Names of the base addresses that `run` is given, in its order.

    Example:
        stage(f, [0, At("x")]), barrier(), stage(g, [0, At("x", 4)]); run([1000], 2): two threads do f's job
        with fields [0, 1000], and when it is finished g's with [0, 1004].
    """

    def __init__(self, bases: Sequence[str]) -> None:
        self._bases = {name: index for index, name in enumerate((_SELF, *bases))}
        self._entries: list[tuple[int, int]] = []
        self._jobs: list[int | At] = []
        self._template: Any = None

    def stage(self, function: int, fields: Sequence[int | At]) -> None:
        """Adds a job of a C function; it may run beside those since the last barrier."""
        self._entries.append((function, len(self._jobs)))
        # Claims of two jobs in one cache line would slow each other down.
        self._jobs += [*fields, *[0] * (-len(fields) % _LINE)]

    def barrier(self) -> None:
        """Lets all threads wait here until the jobs before are finished."""
        self._entries.append((0, 0))

    def twice(self, repeated: Collection[int]) -> StageProgram:
        """A program that does some stages again after all of the same section, to see what they cost.

        Args:
            repeated: Addresses of their functions.

        Example:
            Of f, g, barrier, h the stages of f: f, g, barrier, f, barrier, h.
        """
        made = StageProgram(())
        made._bases = self._bases
        ends = [*[start for function, start in self._entries if function][1:], len(self._jobs)]
        again: list[tuple[int, list[int | At]]] = []
        for function, start in self._entries:
            if function:
                job = self._jobs[start : ends.pop(0)]
                made.stage(function, job)
                again += [(function, job)] if function in repeated else []
                continue
            made.barrier()
            for each in again:
                made.stage(*each)
            if again:
                made.barrier()
            again = []
        return made

    def run(self, addresses: Sequence[int], threads: int) -> None:
        """Runs the program.

        Args:
            addresses: Base addresses in the order of `bases`.
            threads: Number of threads.
        """
        if self._template is None:
            self._lay_out()
        words = np.empty(len(self._template), np.int64)
        begin = words.__array_interface__["data"][0]
        self._fill(self._template, self._slots, self._indices, np.array((begin, *addresses), np.int64), words)
        self._section(begin, threads)

    def _lay_out(self) -> None:
        from retrieval_draft.engine.cpu._kernels.stages import ENTRY, fill

        header = 1 + ENTRY * len(self._entries)
        header += -header % _LINE
        words: list[int | At] = [len(self._entries)]
        for function, start in self._entries:
            words += [function, At(_SELF, 8 * (header + start)) if function else 0, *[0] * (ENTRY - 2)]
        words += [0] * (header - len(words))
        words += self._jobs
        known = [(slot, word) for slot, word in enumerate(words) if isinstance(word, At)]
        self._slots = np.array([slot for slot, _ in known], np.int64)
        self._indices = np.array([self._bases[word.base] for _, word in known], np.int64)
        self._template = np.array([word.offset if isinstance(word, At) else word for word in words], np.int64)
        self._fill, self._section = fill, _section()


_SELF = "program"
_LINE = 8
"""int64 in a cache line."""


def stage_function(name: str) -> int:
    """The address of a compiled function of stages.py."""
    from retrieval_draft._kernels.jit import c_address
    from retrieval_draft.engine.cpu._kernels import stages
    from retrieval_draft.engine.cpu._kernels.linear import SIGNATURE

    return c_address(getattr(stages, name), SIGNATURE)


@cache
def _section() -> Any:
    return on_threads(stage_function("run_stages"))
