"""Tests of the matching kernels."""

import numpy as np

from retrieval_draft.index._kernels import segment_match as kernels
from retrieval_draft.index.segments.segment import Segment, match_state


def test_located_at_once_equals_step_by_step() -> None:
    random = np.random.default_rng(0)
    for vocabulary in (90, 70001):
        runs = [random.integers(0, 3, 300).astype(np.int32) for _ in range(3)]
        segment = Segment.build(runs, vocabulary)
        rows = segment.row[None]
        for trial in range(200):
            size = int(random.integers(0, 60))
            start = int(random.integers(0, 300 - size))
            text = runs[trial % 3][start : start + size].copy()
            if trial % 4 == 0 and size:
                text[random.integers(size)] = random.integers(0, 90)
            chain, longest, tail = match_state(1)
            kernels.advance(rows, chain, longest, tail, text)
            again, found, _ = match_state(1)
            kernels.locate(rows, 0, again, found, tail)
            assert found.tolist() == longest.tolist()
            for length in range(1, kernels.LONGEST + 1):
                mine = kernels.occurrences(rows, 0, again, found, tail, length)
                assert mine == kernels.occurrences(rows, 0, chain, longest, tail, length)
                if kernels.SINGLE != chain[0, length, 1] != kernels.UNKNOWN and mine:
                    assert again[0, length].tolist() == chain[0, length].tolist()
