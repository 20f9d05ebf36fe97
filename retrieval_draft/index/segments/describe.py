"""Statistics of an index: lengths of repeated text, and numbers of different continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.segments.segment import Segment

__all__ = ["Description", "describe"]

LONGEST_MATCH = 64
CONTEXTS = (1, 2, 3, 4, 6, 8)
_READ = 1024


@dataclass(frozen=True, slots=True)
class Description:
    """Statistics of a sample of positions.

    Attributes:
        sampled: Number of positions.
        match_lengths: int64, shape (65,). Number of positions whose next so many tokens equal those of
            another one of their segment; the last counts 64 and more.
        branching: For some context lengths, the number of different next tokens of each sampled context.
    """

    sampled: int
    match_lengths: NDArray[np.int64]
    branching: dict[int, NDArray[np.int64]]

    @property
    def median_match(self) -> int:
        """Median number of repeated tokens over the positions."""
        if not self.sampled:
            return 0
        return int(np.searchsorted(np.cumsum(self.match_lengths), self.sampled / 2))


def describe(segments: Sequence[Segment], samples: int = 2000, seed: int = 0) -> Description:
    """Samples positions of all segments uniformly.

    Args:
        segments: Of one index or several.
        samples: Positions.
        seed: The same seed samples the same positions.

    Example:
        texts 7 8 9 and 7 8 5: of the six positions two repeat two tokens, two one, the others none; 8 has two
        continuations, 7 has one
    """
    random = np.random.default_rng(seed)
    sizes = np.array([segment.num_tokens for segment in segments], np.float64)
    lengths = np.zeros(LONGEST_MATCH + 1, np.int64)
    branching: dict[int, list[int]] = {length: [] for length in CONTEXTS}
    if not sizes.sum():
        return Description(0, lengths, {length: np.empty(0, np.int64) for length in CONTEXTS})
    chosen = random.choice(len(segments), samples, p=sizes / sizes.sum())
    for number in chosen:
        segment = segments[number]
        rank = int(random.integers(segment.num_tokens))
        position = int(segment.suffixes[rank])
        near = [other for other in (rank - 1, rank + 1) if 0 <= other < segment.num_tokens]
        longest = max((_common(segment, position, int(segment.suffixes[other])) for other in near), default=0)
        lengths[longest] += 1
        for length in CONTEXTS:
            context = segment.tokens[position : position + length].astype(np.int64)
            if len(context) == length and not (context == segment.separator).any():
                branching[length].append(len(segment.followers(context.astype(np.int32), _READ)))
    found = {length: np.array(counts, np.int64) for length, counts in branching.items()}
    return Description(samples, lengths, found)


def _common(segment: Segment, first: int, second: int) -> int:
    """Tokens that two positions have in common, up to the end of a text."""
    left = segment.tokens[first : first + LONGEST_MATCH].astype(np.int64)
    right = segment.tokens[second : second + LONGEST_MATCH].astype(np.int64)
    size = min(len(left), len(right))
    differs = (left[:size] != right[:size]) | (left[:size] == segment.separator)
    return int(differs.argmax()) if differs.any() else size
