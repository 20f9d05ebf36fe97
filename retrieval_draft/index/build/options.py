"""Options of a build, and their defaults on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated

from retrieval_draft._settings import Range, check_ranges
from retrieval_draft.errors import InvalidInputError

__all__ = ["RUN_TOKENS", "BuildOptions"]

RUN_TOKENS = 1 << 24
"""Tokens read at a time; after an interruption at most as many are read again."""

MAX_SEGMENT_TOKENS = 1 << 27
_MEMORY_SHARE = 64


MOST_WORKERS = 1024


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of reading and sorting.

    Attributes:
        text_column: Field or column with the text; a.b reaches inside.
        limit: Documents to take at most; None for all.
        skip: Documents to leave out at the beginning.
        workers: Threads that sort. All cores by default.
        segment_tokens: Tokens of a segment at most; 0 for a size that suits this machine's memory.
    """

    text_column: str = "text"
    limit: Annotated[int | None, Range(1, 1 << 62)] = None
    skip: Annotated[int, Range(0, 1 << 62)] = 0
    workers: Annotated[int, Range(1, MOST_WORKERS)] = field(default_factory=_cores)
    segment_tokens: Annotated[int, Range(0, 2**31 - 2**20)] = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if 0 < self.segment_tokens < 64:
            raise InvalidInputError(f"segment_tokens is {self.segment_tokens}; it must be 0, or 64 or more.")

    @property
    def most(self) -> int:
        """Largest length of a segment, separators included.

        Fewer and larger segments are looked up faster; sorting one takes about 13 bytes a token, so by
        default a fifth of the memory at most.
        """
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.segment_tokens or max(RUN_TOKENS, min(MAX_SEGMENT_TOKENS, memory // _MEMORY_SHARE))
