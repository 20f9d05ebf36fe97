"""Rows of a batch as an engine names them, right or wrong."""

import numpy as np
import pytest

from retrieval_draft.integrations.vllm._kernels.rows import follow_rows

WIDTH = 8


def followed(rows: list[int], starts: list[int], ends: list[int], guesses: list[int]) -> list[int]:
    texts = np.tile(np.arange(WIDTH, dtype=np.int32), (2, 1))
    known, lengths = texts.copy(), np.array([3, -1], np.int64)
    found = np.empty(len(rows), np.int64)
    follow_rows(
        texts, *(np.array(each, np.int64) for each in (rows, starts, ends, guesses)), known, lengths,
        np.zeros(2, np.bool_), found,
    )  # fmt: skip
    return found.tolist()


def test_a_row_goes_on_from_its_text() -> None:
    assert followed([0], [3], [5], [0]) == [0]
    assert followed([1], [3], [5], [-1]) == [0]
    assert followed([0], [2], [5], [0]) == [-1]


@pytest.mark.parametrize(
    ("rows", "starts", "ends", "guesses"),
    [
        ([2], [3], [5], [0]),
        ([-3], [3], [5], [0]),
        ([0], [-1], [5], [1]),
        ([0], [3], [2], [0]),
        ([0], [3], [WIDTH + 1], [0]),
        ([0], [2**62], [2**62], [0]),
        ([0], [-(2**62)], [0], [0]),
        ([0, 5], [3, 3], [5, 5], [7, 2**40]),
    ],
)
def test_numbers_of_no_row_name_no_text(rows, starts, ends, guesses) -> None:
    found = followed(rows, starts, ends, guesses)
    assert all(slot == -1 for row, slot in zip(rows, found, strict=True) if row != 0 or len(rows) == 1)
